"""Training: recipes, stages, and the loop that runs them on one process or many."""
