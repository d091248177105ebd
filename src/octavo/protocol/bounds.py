"""One table of bounds (rule R5): validation, OpenAPI and the fuzz tests all read these types.

Each name is a type with its range inside, so msgspec rejects a bad value while it decodes and
``msgspec.json.schema`` prints the same range. Token ids have no upper bound here because the
vocabulary is the model's; ``protocol.validate`` checks that part.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Meta(max_length=4_194_304)]
Count = Annotated[int, Meta(ge=1, le=128)]  # n, best of
MaxTokens = Annotated[int, Meta(ge=1, le=2**31 - 1)]
MinTokens = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Temperature = Annotated[float, Meta(ge=0.0, le=100.0)]
TopP = Annotated[float, Meta(gt=0.0, le=1.0)]
TopK = Annotated[int, Meta(ge=-1, le=2**31 - 1)]  # -1 and 0 both mean "off"
MinP = Annotated[float, Meta(ge=0.0, le=1.0)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]  # presence, frequency
RepetitionPenalty = Annotated[float, Meta(gt=0.0, le=100.0)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
NumLogprobs = Annotated[int, Meta(ge=-1, le=2**31 - 1)]  # -1 = whole vocabulary; the server caps it
StopString = Annotated[str, Meta(min_length=1, max_length=1024)]
StopStrings = Annotated[list[StopString], Meta(max_length=64)]
StopTokenIds = Annotated[list[TokenId], Meta(max_length=1024)]
AllowedTokenIds = Annotated[list[TokenId], Meta(min_length=1, max_length=131_072)]
BadWord = Annotated[str, Meta(min_length=1, max_length=256)]
BadWords = Annotated[list[BadWord], Meta(max_length=128)]
BiasValue = Annotated[float, Meta(ge=-100.0, le=100.0)]
LogitBias = Annotated[dict[int, BiasValue], Meta(max_length=1024)]
Priority = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
Text = Annotated[
    str, Meta(max_length=16_777_216)
]  # of a prompt or a message; the body's limit is the usual one
CacheSalt = Annotated[str, Meta(min_length=1, max_length=256)]
RequestId = Annotated[str, Meta(min_length=1, max_length=256)]
GrammarText = Annotated[
    str, Meta(min_length=1, max_length=262_144)
]  # regex, Lark grammar, JSON schema as text
Choices = Annotated[
    list[Annotated[str, Meta(min_length=1, max_length=4096)]], Meta(min_length=1, max_length=4096)
]
WhitespacePattern = Annotated[str, Meta(min_length=1, max_length=256)]
DryMultiplier = Annotated[float, Meta(ge=0.0, le=100.0)]
DryBase = Annotated[float, Meta(ge=1.0, le=8.0)]
DryLength = Annotated[int, Meta(ge=1, le=64)]
DryBreakers = Annotated[list[Annotated[str, Meta(min_length=1, max_length=40)]], Meta(max_length=16)]
PatternSize = Annotated[int, Meta(ge=0, le=256)]  # tokens; 0 means "not given"
PatternCount = Annotated[int, Meta(ge=2, le=64)]
Milliseconds = Annotated[int, Meta(ge=1, le=86_400_000)]  # deadlines: at most a day
TenantName = Annotated[str, Meta(max_length=256)]
Weight = Annotated[float, Meta(gt=0.0, le=1000.0)]  # share of a tenant under fair scheduling
BeamWidth = Annotated[int, Meta(ge=1, le=64)]
Dimensions = Annotated[int, Meta(ge=1, le=65536)]
Truncate = Annotated[int, Meta(ge=-1, le=2**31 - 1)]  # keep so many tokens; -1: as many as fit
TemplateSource = Annotated[str, Meta(min_length=1, max_length=65_536)]  # a chat template of a request
LengthPenalty = Annotated[float, Meta(ge=-10.0, le=10.0)]  # exponent of the length in a beam's score
ThinkingBudget = Annotated[int, Meta(ge=-1, le=2**31 - 1)]  # tokens; -1 = no bound
