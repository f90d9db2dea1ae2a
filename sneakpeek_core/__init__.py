"""SneakPeek's engine: long, step-by-step videos streamed from a start image and a list of steps.

    steps (text, seconds) -> schedule -> conditioning -> sampler(denoiser, cache) -> latents
        -> streaming decode -> frames -> preview | file

Data flows one way: the sampler does not know that frames exist, the decoder does not know that
sigmas exist. A plain PyTorch library; it never imports ComfyUI.
"""

__version__ = "0.1.0"
