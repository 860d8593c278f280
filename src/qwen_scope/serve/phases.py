"""The phases of a chat's tokens, for requests whose interventions or read-outs name phases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from qwen_scope.errors import InputError
from qwen_scope.steer import phases_for
from qwen_scope.text import Chat, tokenize

from .protocol import Ask, PromptKinds

OWN_FORM = ("tools", "documents", "chat_template", "continue_final_message", "add_special_tokens", "structural_tag")
"""Keys of a chat's body that give the prompt another form than the template alone."""

SWITCH = "enable_thinking"


def chat_kinds(ask: Ask, data: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> PromptKinds:
    """The phases of the prompt that the server makes of a chat's messages; admission compares the number of tokens.

    Raises:
        InputError: a chat in a form whose phases are not known, or phases that none of its tokens can have.
    """
    for key in OWN_FORM:
        if data.get(key):
            raise InputError(f"phases of a chat with {key} are not known; name prompt, generated or positions instead")
    kwargs = data.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, dict) or set(kwargs) - {SWITCH} or not isinstance(kwargs.get(SWITCH, True), bool):
        raise InputError(f"phases of a chat are known with no other chat_template_kwargs than {SWITCH}")
    if data.get("add_generation_prompt") is False:
        raise InputError("phases of a chat are known with its generation prompt; leave add_generation_prompt away")
    mode: Chat = "default" if SWITCH not in kwargs else "thinking" if kwargs[SWITCH] else "non_thinking"
    messages = data.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InputError("a chat has messages")
    contents = [one.get("content") for one in messages if isinstance(one, Mapping)]
    if any(isinstance(content, list) and len(content) > 1 for content in contents):  # joined in vLLM's own way
        raise InputError("phases of a chat are known where the content of each message is one text; join its parts")
    tokens = tokenize(tokenizer, [messages], max_length=None, chat=mode)
    phases_for(ask.interventions, tokenizer, tokens, mode)
    return PromptKinds.of(tokens.phases(0)[1].tolist(), mode, tokens.rendered[0].next_phase)
