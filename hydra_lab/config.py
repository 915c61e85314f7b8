"""Configuration of a Hydra model: one documented field per line, checked when it is made."""

from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import PreTrainedConfig

CHUNK_POOLINGS = ("ema", "first", "mean")
SELECTIONS = ("token", "tile")
OPS_BACKENDS = ("auto", "torch", "triton", "mamba_ssm", "reference")


@strict
class HydraConfig(PreTrainedConfig):
    """Sizes and choices of a Hydra model (arXiv 2508.15099).

    Block `i` of `num_hidden_layers` computes `y = x + sum_p g_p * path_p(RMSNorm(x))`. Every block has the `ssm`
    path; the fields below say which blocks have the others. Lists of blocks count from 0.

    Raises:
        ValueError: if fields contradict each other; the message names the field, its value and what would be right.
    """

    model_type = "hydra"

    vocab_size: int = 4096
    """Number of token ids."""
    hidden_size: int = 192
    """Width D of the residual stream."""
    num_hidden_layers: int = 6
    """Number of blocks."""
    norm_eps: float = 1e-5
    """Epsilon of every RMSNorm."""
    initializer_range: float = 0.02
    """Standard deviation of linear and embedding weights at the start."""
    gate_init: float = 1.0
    """Start of every path's gate g_p. Output projections of the optional paths start at zero, so the paths join
    silently, and gates near one keep their gradients large (smaller gates were seen to collapse)."""
    tie_word_embeddings: bool = True
    """Whether the output layer uses the embedding matrix."""
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    use_cache: bool = True
    """Whether `generate` keeps the decode state."""
    ops_backend: str = "auto"
    """Implementation of the operations: `auto` (the fastest measured one on the device), `torch`, `triton`, `mamba_ssm`
    or `reference`. A `hydra_lab.ops.use_backend` block around the model goes before it."""

    ssm_state_size: int = 64
    """State size N per channel of a head (Mamba-2)."""
    ssm_expand: int = 2
    """Inner width over hidden size."""
    ssm_head_dim: int = 64
    """Channels P per head."""
    ssm_num_groups: int = 1
    """Groups of heads that share B and C."""
    ssm_conv_kernel: int = 4
    """Width of the causal convolution, in tokens."""
    ssm_chunk_size: int = 64
    """Chunk of the SSD algorithm, and the distance between two state readings. Does not change the result."""

    attention_every: int = 3
    """Blocks with (i + 1) % attention_every == 0 have the `attention` path; 0 means none."""
    attention_num_heads: int = 4
    """Query heads."""
    attention_num_kv_heads: int = 2
    """Key-value heads (grouped-query attention)."""
    attention_head_dim: int = 48
    """Channels per head."""
    attention_window: int = 128
    """Sliding window: tokens that a query sees, itself included."""
    attention_block_size: int = 32
    """Tokens per block; the first block is the sink, later ones can be selected once they are complete."""
    attention_num_selected: int = 2
    """Blocks that are selected per query and key-value head."""
    attention_selection: str = "token"
    """`token`: each token selects; `tile`: the first token of a block-sized tile selects for the tile."""
    attention_rope_theta: float | None = None
    """Base of rotary position embeddings; None means no positional encoding."""

    moe_layers: list[int] | None = None
    """Blocks with the `moe` path; None means every other block, from block 0."""
    moe_num_experts: int = 8
    """Experts E per block."""
    moe_top_k: int = 2
    """Experts that a chunk uses."""
    moe_hidden_size: int = 256
    """Hidden width F of an expert's SwiGLU."""
    moe_chunk_size: int = 32
    """Tokens per routing decision; 1 routes every token on its own."""
    moe_chunk_pooling: str = "ema"
    """What a chunk is routed from: `ema` = its first token and an exponential average of the earlier chunks' means;
    `first` = its first token alone; `mean` = its own mean, which lets tokens see the future of their chunk (the
    prototype's defect, kept for study only)."""
    moe_ema_decay: float = 0.8
    """Decay per chunk of that average."""
    moe_load_balance_weight: float = 0.01
    """Weight of the Switch load-balance loss (arXiv 2101.03961, eq. 4) in the training loss."""
    moe_router_z_weight: float = 0.001
    """Weight of the router z-loss (arXiv 2202.08906, eq. 5) in the training loss."""

    workspace_layers: list[int] | None = None
    """Blocks with the `workspace` path; None means none."""
    workspace_num_slots: int = 16
    """Slots S, private to a sequence."""
    workspace_slot_size: int = 128
    """Width of a slot."""
    workspace_key_size: int = 32
    """Width of the write and read keys."""
    workspace_chunk_size: int = 32
    """Tokens per write."""

    memory_layers: list[int] | None = None
    """Blocks with the `memory` path; None means none."""
    memory_num_keys: list[int] | tuple[int, ...] = (128, 128)
    """Half-key counts (n1, n2); the value table has n1 * n2 rows."""
    memory_num_heads: int = 4
    """Query heads, which share the value table."""
    memory_key_size: int = 32
    """Channels of a half-key."""
    memory_top_k: int = 8
    """Rows read per head."""
    memory_value_size: int | None = None
    """Width of a value row; None means `hidden_size`."""

    def __post_init__(self, **kwargs: Any) -> None:
        if self.moe_layers is None:
            self.moe_layers = list(range(0, self.num_hidden_layers, 2))
        self.moe_layers = list(self.moe_layers)
        self.workspace_layers = list(self.workspace_layers or [])
        self.memory_layers = list(self.memory_layers or [])
        self.memory_num_keys = tuple(self.memory_num_keys)
        if self.memory_value_size is None:
            self.memory_value_size = self.hidden_size
        super().__post_init__(**kwargs)
        self._check_fields()  # not `validate_architecture`: its errors would not reach the caller as ValueError

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "HydraConfig":
        """The configuration of a preset (`nano`, `demo`, `29m`, `1.6b`), with any field overridden.

        Raises:
            ValueError: if there is no such preset or field, or an override has the wrong type or value.
        """
        from hydra_lab.presets import PRESETS

        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is not one of {', '.join(PRESETS)}")
        unknown = set(overrides) - set(cls.__dataclass_fields__)
        if unknown:
            raise ValueError(f"HydraConfig has no field {', '.join(sorted(unknown))}")
        try:
            return cls(**{**PRESETS[name], **overrides})
        except StrictDataclassFieldValidationError as error:
            raise ValueError(str(error.__cause__)) from error

    @property
    def ssm_inner_size(self) -> int:
        """Channels inside the ssm path: `ssm_expand * hidden_size`."""
        return self.ssm_expand * self.hidden_size

    @property
    def ssm_num_heads(self) -> int:
        """Heads of the ssm path."""
        return self.ssm_inner_size // self.ssm_head_dim

    @property
    def attention_layers(self) -> list[int]:
        """Blocks with the `attention` path."""
        if self.attention_every == 0:
            return []
        return [i for i in range(self.num_hidden_layers) if (i + 1) % self.attention_every == 0]

    def layers_with(self, path: str) -> list[int]:
        """Blocks that have `path`, one of `hydra_lab.taps.PATHS`."""
        if path == "ssm":
            return list(range(self.num_hidden_layers))
        if path not in ("attention", "moe", "workspace", "memory"):
            raise ValueError(f"path {path!r} is not one of ssm, attention, moe, workspace, memory")
        return list(getattr(self, f"{path}_layers"))

    def _check_fields(self) -> None:
        positive = [
            "vocab_size", "hidden_size", "num_hidden_layers", "ssm_state_size", "ssm_expand", "ssm_head_dim",
            "ssm_num_groups", "ssm_conv_kernel", "ssm_chunk_size", "attention_num_heads", "attention_num_kv_heads",
            "attention_head_dim", "attention_window", "attention_block_size", "moe_num_experts", "moe_top_k",
            "moe_hidden_size", "moe_chunk_size", "workspace_num_slots", "workspace_slot_size", "workspace_key_size",
            "workspace_chunk_size", "memory_num_heads", "memory_key_size", "memory_top_k",
            "memory_value_size",
        ]  # fmt: skip
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        not_negative = (
            "attention_every", "attention_num_selected", "moe_load_balance_weight", "moe_router_z_weight",
            "initializer_range",
        )  # fmt: skip
        for name in not_negative:
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")
        for name in ("norm_eps", "attention_rope_theta"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} must be above 0")
        self._check_divides("ssm_head_dim", self.ssm_inner_size, "ssm_expand * hidden_size")
        self._check_divides("ssm_num_groups", self.ssm_num_heads, "the number of ssm heads")
        self._check_divides("attention_num_kv_heads", self.attention_num_heads, "attention_num_heads")
        if self.attention_rope_theta is not None and self.attention_head_dim % 2:
            raise ValueError(
                f"attention_head_dim={self.attention_head_dim} must be even with rotary embeddings"
            )
        if self.ops_backend not in OPS_BACKENDS:
            raise ValueError(f"ops_backend={self.ops_backend!r} is not one of {OPS_BACKENDS}")
        if self.attention_selection not in SELECTIONS:
            raise ValueError(f"attention_selection={self.attention_selection!r} is not one of {SELECTIONS}")
        if self.moe_chunk_pooling not in CHUNK_POOLINGS:
            raise ValueError(f"moe_chunk_pooling={self.moe_chunk_pooling!r} is not one of {CHUNK_POOLINGS}")
        if self.moe_top_k > self.moe_num_experts:
            raise ValueError(
                f"moe_top_k={self.moe_top_k} must be at most moe_num_experts={self.moe_num_experts}"
            )
        if not 0 < self.moe_ema_decay < 1:
            raise ValueError(f"moe_ema_decay={self.moe_ema_decay} must lie between 0 and 1")
        if len(self.memory_num_keys) != 2 or min(self.memory_num_keys) < 1:
            raise ValueError(f"memory_num_keys={self.memory_num_keys} must be two positive counts (n1, n2)")
        if self.memory_top_k > min(self.memory_num_keys):
            raise ValueError(
                f"memory_top_k={self.memory_top_k} must be at most the smaller of "
                f"memory_num_keys={self.memory_num_keys}"
            )
        for path in ("moe", "workspace", "memory"):
            layers = self.layers_with(path)
            if len(set(layers)) != len(layers) or any(not 0 <= i < self.num_hidden_layers for i in layers):
                raise ValueError(
                    f"{path}_layers={layers} must be different blocks between 0 and {self.num_hidden_layers - 1}"
                )

    def _check_divides(self, name: str, whole: int, whole_name: str) -> None:
        if whole % getattr(self, name):
            raise ValueError(f"{name}={getattr(self, name)} must divide {whole_name} ({whole})")
