"""How the families write tool calls: a small table each."""

from __future__ import annotations

from octavo.api.chat.formats.bodies import Tags
from octavo.api.chat.formats.program import PYTHON, Dialect
from octavo.api.chat.formats.tools import ToolSyntax

BAR = "\uff5c"  # a wide bar, which DeepSeek writes into its marks

HERMES = ToolSyntax("hermes", "<tool_call>", "</tool_call>")
LLAMA3_JSON = ToolSyntax("llama3_json", "<|python_tag|>", args_key="parameters", bare="{", separator="; ")
MISTRAL = ToolSyntax("mistral", "[TOOL_CALLS]", is_list=True, separator=", ", id_length=9)
MISTRAL_NAMED = ToolSyntax("mistral_named", "[TOOL_CALLS]", args_mark="[ARGS]", separator="", id_length=9)
PHI4_MINI = ToolSyntax("phi4_mini_json", "<|tool_call|>", "<|/tool_call|>", is_list=True, separator=", ")
GRANITE = ToolSyntax("granite", "<|tool_call|>", is_list=True, separator=", ")
DEEPSEEK_V3 = ToolSyntax(
    "deepseek_v3",
    f"<{BAR}tool▁calls▁begin{BAR}>",
    f"<{BAR}tool▁calls▁end{BAR}>",
    args_mark="\n```json\n",
    call_begin=f"<{BAR}tool▁call▁begin{BAR}>",
    name_before="function",
    name_mark=f"<{BAR}tool▁sep{BAR}>",
    args_end="\n```",
    call_end=f"<{BAR}tool▁call▁end{BAR}>",
)
DEEPSEEK_V31 = ToolSyntax(
    "deepseek_v31",
    f"<{BAR}tool▁calls▁begin{BAR}>",
    f"<{BAR}tool▁calls▁end{BAR}>",
    args_mark=f"<{BAR}tool▁sep{BAR}>",
    call_begin=f"<{BAR}tool▁call▁begin{BAR}>",
    call_end=f"<{BAR}tool▁call▁end{BAR}>",
    separator="",
)
KIMI_K2 = ToolSyntax(
    "kimi_k2",
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    args_mark="<|tool_call_argument_begin|>",
    call_begin="<|tool_call_begin|>",
    name_before="functions.",
    call_end="<|tool_call_end|>",
    numbered=True,
    separator="",
)
QWEN3_CODER = ToolSyntax(
    "qwen3_coder",
    "<tool_call>",
    "</tool_call>",
    tags=Tags("<function=", (">",), "<parameter=", ">", "", "</parameter>", "</function>"),
)
GLM45 = ToolSyntax(
    "glm45",
    "<tool_call>",
    "</tool_call>",
    tags=Tags(
        "", ("\n", "<"), "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "</tool_call>", True
    ),
)
FUNCTIONGEMMA = ToolSyntax(
    "functiongemma",
    "<start_function_call>",
    "<end_function_call>",
    program=Dialect("call:", "{", ":", ("<escape>",)),
)
GEMMA4 = ToolSyntax("gemma4", "<|tool_call>", "<tool_call|>", program=Dialect("call:", "{", ":", ('<|"|>',)))
LLAMA4_PYTHONIC = ToolSyntax(
    "llama4_pythonic", "<|python_start|>", "<|python_end|>", program=PYTHON, bare="["
)
LFM2 = ToolSyntax("lfm2", "<|tool_call_start|>", "<|tool_call_end|>", program=PYTHON)
OLMO3 = ToolSyntax("olmo3", "<function_calls>", "</function_calls>", program=PYTHON)
# gpt-oss: messages on channels, read by ``harmony``; these fields only serve the grammar.
HARMONY = ToolSyntax(
    "harmony",
    "to=functions.",
    call_begin="<|channel|>",
    name_before="commentary to=functions.",
    args_mark="<|message|>",
)
# For models whose template knows nothing of tools (or writes calls in a way not known here): the prompt explains it.
GENERIC = ToolSyntax("json", "<tool_call>", "</tool_call>")

# Marks that must (and must not) stand in the template; the first row that fits and is proved wins.
ROWS: tuple[tuple[ToolSyntax, tuple[str, ...], tuple[str, ...]], ...] = (
    (KIMI_K2, ("<|tool_calls_section_begin|>", "<|tool_call_argument_begin|>"), ()),
    (DEEPSEEK_V3, (f"<{BAR}tool▁calls▁begin{BAR}>", "```json"), ()),
    (DEEPSEEK_V31, (f"<{BAR}tool▁calls▁begin{BAR}>",), ("```json",)),
    (MISTRAL_NAMED, ("[TOOL_CALLS]", "[ARGS]"), ()),
    (MISTRAL, ("[TOOL_CALLS]",), ("[ARGS]",)),
    (QWEN3_CODER, ("<tool_call>", "<function=", "<parameter="), ()),
    (GLM45, ("<tool_call>", "<arg_key>", "<arg_value>"), ()),
    (HERMES, ("<tool_call>", "</tool_call>"), ("<function=", "<arg_key>")),
    (FUNCTIONGEMMA, ("<start_function_call>", "<escape>"), ()),
    (GEMMA4, ("<|tool_call>", '<|"|>'), ()),
    (LFM2, ("<|tool_call_start|>",), ()),
    (OLMO3, ("<function_calls>",), ()),
    (LLAMA4_PYTHONIC, ("<|python_start|>",), ()),
    (LLAMA4_PYTHONIC, ("func_name1(params_name1",), ()),
    (PHI4_MINI, ("<|tool|>", "<|/tool|>"), ()),
    (GRANITE, ("<|tool_call|>",), ("<|tool|>",)),
    (LLAMA3_JSON, ("tools", '"parameters"'), ("<tool_call>",)),
    (LLAMA3_JSON, ("tools", "<|python_tag|>"), ("<tool_call>",)),
)
# Templates of these print the tools but no calls of earlier turns: there is nothing to prove the row with.
UNPROVED = (PHI4_MINI,)
