"""The Wan 2.1 video VAE: its tree and step functions (`wan`), and streams of them (`streaming`).

Latents that enter or leave this package are model-space ones (normalised, as the transformer sees
them); frames are BFHWC in [0, 1].
"""
