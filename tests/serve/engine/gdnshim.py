"""The linear attention of Qwen3.5 in fp32 for vLLM on a CPU, whose own kernel takes bf16 alone. Tests only.

The convolution is PyTorch's, the recurrence the one that transformers runs token by token; where each request keeps its
state is vLLM's.
"""

import torch
import torch.nn.functional as F
import vllm.model_executor.layers.mamba.ops.cpu.gdn_attention as gdn  # pyright: ignore[reportMissingImports]
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule
from vllm.forward_context import get_forward_context  # pyright: ignore[reportMissingImports]


def core(
    mixed_qkv: torch.Tensor,
    b: torch.Tensor,
    a: torch.Tensor,
    core_attn_out: torch.Tensor,
    layer_name: gdn.LayerNameType,
) -> None:
    """One layer's attention over the tokens of a step, each request from its own state."""
    context, name = get_forward_context(), gdn._resolve_layer_name(layer_name)
    layer, told = context.no_compile_layers[name], context.attn_metadata
    if told is None or told[layer.prefix].num_actual_tokens == 0:
        return
    told = told[layer.prefix]
    weight = gdn._unpacked_conv_weight(layer)
    history, states = gdn._conv_buffer_view(layer), gdn._ssm_state_view(layer)
    ends = told.non_spec_query_start_loc.tolist()
    fresh = [False] * (len(ends) - 1)
    if told.has_initial_state is not None:
        fresh = (~told.has_initial_state).tolist()
    for i, slot in enumerate(told.non_spec_state_indices_tensor.tolist()[: len(fresh)]):
        start, end = ends[i], ends[i + 1]
        if fresh[i]:
            history[slot], states[slot] = 0, 0
        seen = torch.cat([history[slot], mixed_qkv[start:end].T.to(history.dtype)], 1)
        mixed = F.silu(F.conv1d(seen[None], weight[:, None], layer.conv1d.bias, groups=len(weight))[0]).T
        history[slot] = seen[:, -history.shape[2] :]
        query, key, value = layer.rearrange_mixed_qkv(mixed)
        shared = value.shape[2] // key.shape[2]
        out, state = torch_recurrent_gated_delta_rule(
            query.repeat_interleave(shared, 2),
            key.repeat_interleave(shared, 2),
            value,
            (-layer.A_log.exp() * F.softplus(a[start:end].float() + layer.dt_bias))[None],
            b[start:end].sigmoid()[None],
            initial_state=states[slot][None],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        core_attn_out[start:end], states[slot] = out[0], state[0]


gdn.cpu_gdn_attention_core = core
