"""Stands in for SGLang's compiled kernels, which no package index has for CPUs.

SGLang imports a few names from ``sgl_kernel`` at the start and calls them only for speculative
decoding and compiled attention. Those names exist here and raise when called. Every other name is
missing, as SGLang tries many and takes its PyTorch implementations after an ImportError; so does
its check for compiled kernels, because ``torch.ops.sgl_kernel`` stays empty.
"""

__version__ = "0.0.0"

_IMPORTED = (
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "verify_tree_greedy_cpu",
)


def _kernel(name):
    def missing(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name} needs SGLang's compiled CPU kernels")

    missing.__name__ = name
    return missing


globals().update({name: _kernel(name) for name in _IMPORTED})
