"""How the embedded model is spoken to: its special tokens, its chat template and its tokenizer.

Comes in: vocabulary and merges of a byte-level BPE. Goes out: a fast tokenizer.
The layout is ChatML, which SmolLM2 was tuned on; pictures and tools are this project's addition to it.
Must not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT, TURN_START, TURN_END, IMAGE = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"
SYSTEM_PROMPT = "You are a helpful AI assistant."

CHAT_TEMPLATE = (
    """\
{%- macro parts(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- elif content -%}
    {%- for part in content -%}
      {%- if part['type'] in ['image', 'image_url'] -%}
        {{- '<image>\\n' -}}
      {%- elif part['type'] == 'text' -%}
        {{- part['text'] -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- set given = messages[0]['role'] == 'system' -%}
{{- '<|im_start|>system\\n' -}}
{{- parts(messages[0]['content']) if given else '"""
    + SYSTEM_PROMPT
    + """' -}}
{%- if tools -%}
  {{- '\\n\\nTo use a tool, answer with <tool_call>{"name": ..., "arguments": {...}}</tool_call>.\\n<tools>\\n' -}}
  {%- for tool in tools -%}
    {{- (tool | tojson) + '\\n' -}}
  {%- endfor -%}
  {{- '</tools>' -}}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- for message in (messages[1:] if given else messages) -%}
  {{- '<|im_start|>' + message['role'] + '\\n' + parts(message['content']) -}}
  {%- for call in message['tool_calls'] or [] -%}
    {%- set function = call['function'] -%}
    {{- '<tool_call>' + ({'name': function['name'], 'arguments': function['arguments']} | tojson) -}}
    {{- '</tool_call>' -}}
  {%- endfor -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
)


def build_tokenizer(
    tokens: list[str], merges: list[str], special: list[int], max_length: int
) -> PreTrainedTokenizerFast:
    """The fast tokenizer: digits one by one, then GPT-2's byte-level split, then BPE; `<image>` comes last.

    `special` are the ids of `tokens` that are control tokens and never come from text bytes.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: index for index, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer: Any = Tokenizer(models.BPE(vocab=vocab, merges=pairs, fuse_unk=False, byte_fallback=False))
    split: Any = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    control = [tokens[index] for index in special] + [IMAGE]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=TURN_START,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        image_token=IMAGE,
        extra_special_tokens={"image_token": IMAGE},
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
