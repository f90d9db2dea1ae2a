"""The forward runs over ComfyUI's own Wan module as it runs over ours: the tree is the contract."""

from tests.comfyui import NEWEST, run_inside

SCRIPT = """
    import comfy.ops
    from comfy.ldm.wan.model import WanModel
    from sneakpeek_core.model.config import ModelConfig
    from sneakpeek_core.model.forward import Host, TextRun, check_tree, text_layers, velocity
    from sneakpeek_core.model.initial import random_transformer
    from sneakpeek_core.model.rope import rope_for, rotate

    config = ModelConfig(dim=256, ffn_dim=512, layers=2, text_dim=64, text_len=32)
    ours = random_transformer(config, 0)
    host = WanModel(
        model_type="t2v", patch_size=(1, 2, 2), text_len=32, in_dim=16, dim=256, ffn_dim=512,
        freq_dim=256, text_dim=64, out_dim=16, num_heads=2, num_layers=2, device="cpu",
        dtype=torch.float32, operations=comfy.ops.manual_cast,
    )
    host.load_state_dict(ours.state_dict(), strict=True)
    check_tree(host)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, 3, 8, 12, generator=rng)
    text = torch.randn(2, 32, 64, generator=rng)
    time = torch.full((2, 3), 700.0)

    def run(tree):
        return velocity(
            tree, x, time, rope_for(range(3), 4, 6, head_dim=128),
            [TextRun(0, 3, text_layers(tree, text))],
            lambda layer, k, v, rope: (rotate(k, rope), v, None),
            dtype=torch.float32, host=Host(),
        )

    with torch.no_grad():
        own = host(x, time[:, 0], text)
        assert torch.equal(run(ours), run(host)), "the two trees differ"
        gap = (run(host) - own).abs().max().item()
    assert gap < 1e-4, f"{gap} from the host's own forward"
"""


def test_comfyui_module_is_a_host():
    """Over ComfyUI's WanModel the result is bitwise ours, and within 1e-4 of its own forward."""
    run_inside(NEWEST, SCRIPT)
