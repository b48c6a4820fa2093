"""BridgeArguments: the typed arguments every room below the adapter takes.

Sections and field names are Megatron-Bridge's (ConfigContainer); what is ours is marked so. A field without a default
in a user's YAML keeps the value below. Types are checked when values are merged (config/merge.py).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional


@dataclass
class ModelArguments:
    """Layout and activation memory of the model. Its shape comes from the Hugging Face config.json, never from here."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: Optional[int] = None
    """Model chunks per pipeline rank (interleaved schedule); None: one."""
    num_layers_in_first_pipeline_stage: Optional[int] = None
    """Uneven pipeline: layers of the first stage; the others share the rest evenly."""
    num_layers_in_last_pipeline_stage: Optional[int] = None
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    """Ranks that share the experts of a layer among them."""
    expert_tensor_parallel_size: Optional[int] = None
    """Ranks that split each expert; None: as tensor_model_parallel_size."""
    sequence_parallel: bool = False
    """Shard activations along the sequence between tensor-parallel blocks; needs tensor parallelism."""
    seq_length: int = 2048
    """Longest sequence, in tokens, that a sample may have."""
    recompute_granularity: Optional[Literal["full", "selective"]] = None
    recompute_method: Optional[Literal["uniform", "block"]] = None
    recompute_num_layers: Optional[int] = None
    make_vocab_size_divisible_by: int = 128
    """The embedding is padded to a multiple of this (and of the tensor-parallel size); export removes the padding."""
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    enable_primus_turbo: bool = False
    """Primus: allow the kernels of Primus-Turbo that the switches below name, where the package and a GPU are."""
    use_turbo_attention: bool = False
    use_turbo_rms_norm: bool = False


@dataclass
class TrainArguments:
    micro_batch_size: int = 1
    global_batch_size: int = 8
    train_iters: int = 100
    """Optimizer steps of the whole run, those before a resume included."""
    num_epochs: Optional[float] = None
    """Passes over the training data in place of train_iters, which then follows from the number of sequences."""
    gradient_accumulation_steps: Optional[int] = None
    """Ours: micro-batches of a step on each data-parallel rank, in place of global_batch_size, which then follows."""
    eval_interval: Optional[int] = None
    """Steps between evaluations; None: none during training, one at the end when there is a validation split."""
    eval_iters: Optional[int] = None
    """Global batches per evaluation; None: the whole validation set."""
    neftune_noise_alpha: Optional[float] = None
    """Ours: NEFTune: uniform noise of this size over sqrt(tokens x hidden size) on the embeddings, in training only."""
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """Ours: what becomes of a step whose loss or gradient norm is no finite number; it never changes the weights. stop:
    the run ends; skip: the step's batch is passed over; rollback: the run goes on from its newest checkpoint, with the
    data after that step."""
    max_nonfinite: int = 10
    """Ours: skip: such steps in a row, and rollback: rollbacks of the whole run, before one more ends it."""
    exit_after_save: bool = False
    """Ours: stop after the first checkpoint (for tests of resume)."""


@dataclass
class OptimizerArguments:
    lr: float = 5e-6
    min_lr: float = 0.0
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    optimizer_cpu_offload: bool = False
    """Keep Adam's moments and the fp32 master weights in the host's memory and update there (a GPU's bf16 runs)."""
    optimizer_offload_fraction: float = 1.0
    """Part of the parameters whose state optimizer_cpu_offload moves; the others stay on the GPU."""
    overlap_cpu_optimizer_d2h_h2d: bool = False
    """With optimizer_cpu_offload: copy one parameter while another is updated."""


@dataclass
class SchedulerArguments:
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    lr_decay_iters: Optional[int] = None
    """Step at which min_lr is reached; None: train_iters. A resumed run follows the arguments it is resumed with: with
    a larger train_iters and no lr_decay_iters its rate rises to the longer schedule's."""
    lr_warmup_iters: int = 0
    lr_warmup_fraction: Optional[float] = None
    """Warm-up as a fraction of lr_decay_iters; instead of lr_warmup_iters."""


@dataclass
class DDPArguments:
    use_distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    grad_reduce_in_fp32: bool = True


@dataclass
class DatasetArguments:
    data_path: Optional[str] = None
    """A data file (JSON, JSONL, CSV, Parquet, Arrow; .gz and .zst too), a folder of them, or a Hugging Face hub id."""
    sources: list[dict[str, Any]] = field(default_factory=list)
    """Ours: several data sets in place of data_path. Each is a mapping: path; and, where it differs from the keys
    beside this one, split, max_samples, dataset_format, columns, custom_format, format_function; name (for the ledger);
    weight: how often each of its samples comes in an epoch (0.5: half of them), default 1."""
    dataset_format: str = "auto"
    """Ours. auto, or one of data.formats.FORMATS; 'text' is for pretraining: rows with a ``text`` column."""
    columns: dict[str, Any] = field(default_factory=dict)
    """Ours: the format's column -> the data's: ``{instruction: question, output: answer}``."""
    custom_format: dict[str, Any] = field(default_factory=dict)
    """Ours, for dataset_format custom: ``{system: ..., user: "{question}", assistant: "{answer}"}``, texts with columns
    in braces; or ``{turns: column, role: key, content: key, roles: {theirs: ours}}``."""
    format_function: Optional[str] = None
    """Ours, for dataset_format custom: dotted path of a Python function from a row (a dict) to one conversation or a
    list of them, each in OpenAI's shape."""
    oasst_paths: Literal["best", "all"] = "best"
    """Ours, for oasst: of each tree the best-ranked path, or every path from the prompt to a last answer."""
    languages: list[str] = field(default_factory=list)
    """Ours, for oasst: keep messages of these languages only; empty: all."""
    include_unreviewed: bool = False
    """Ours, for oasst: also messages that were not reviewed, or not approved. Deleted ones are always left out."""
    bad_rows: Literal["stop", "drop"] = "stop"
    """Ours: a row that does not fit the format or the template stops the run (with file and line), or is counted."""
    prompt_template: str = "auto"
    """Ours. 'auto': alpaca and dolly rows take their own, others the tokenizer's chat template, or chatml without
    one. Else one of data.templates.TEMPLATES, or the path of a .jinja file or of a .yaml with role prefixes."""
    custom_template: Optional[str] = None
    """Ours, for prompt_template custom: Jinja text, or the path of a .jinja file or of a .yaml with role prefixes."""
    enable_thinking: Optional[bool] = None
    """Ours: for templates that know it (Qwen3): write thoughts, or the empty thought that switches them off."""
    loss_on: Literal["assistant", "last_turn", "all"] = "assistant"
    """Ours: loss on every answer and its end of turn, on the last one, or on the whole text."""
    prompt_loss_weight: float = 0.0
    """Ours: loss weight of every other token; 0: none."""
    split: str = "train"
    streaming: bool = False
    """Ours: read and tokenise window by window while training goes on; nothing waits for the whole set."""
    streaming_window: int = 4096
    """Ours: rows that are shuffled and packed together when streaming."""
    validation_data_path: Optional[str] = None
    """A separate validation set; instead of validation_split."""
    validation_data_split: Optional[str] = None
    """Ours: the split of validation_data_path; None: validation, or everything where its files name no split."""
    validation_split: float = 0.0
    """Fraction of the rows held out for evaluation, chosen by seed."""
    max_samples: Optional[int] = None
    truncation: Literal["left", "right", "drop"] = "left"
    """Too long: cut the oldest turns (the system stays; a single exchange that is too long is dropped), cut the end, or
    drop the sample. All are counted."""
    max_dropped_fraction: float = 0.5
    """Ours: stop before training when more than this part of the samples (pretrain: documents) would be lost."""
    packed_sequence: bool = False
    """Several samples in a sequence of seq_length, none of which sees another."""
    pad_to: Literal["longest", "seq_length"] = "longest"
    alpaca_response_newline: bool = True
    """A newline after '### Response:' (most tools) or none (stanford_alpaca)."""
    shuffle: bool = True
    num_workers: Optional[int] = None
    """Processes that tokenise; None: one for every four cores, at most 8."""


@dataclass
class CheckpointArguments:
    save: Optional[str] = None
    load: Optional[str] = None
    """A Megatron checkpoint: resumed when it holds this run's training state, else weights only."""
    pretrained_checkpoint: Optional[str] = None
    """A Megatron checkpoint to take weights from, never its training state."""
    finetune: bool = False
    """Take only weights from ``load`` and start at step 0."""
    save_interval: Optional[int] = None
    """Steps between checkpoints; None: one at the end."""
    save_total_limit: Optional[int] = None
    """Newest checkpoints to keep (Megatron-Bridge: most_recent_k); None: all."""
    keep_every: Optional[int] = None
    """Ours: checkpoints of a multiple of this many steps are kept for ever (Megatron-LM: save_retain_interval)."""
    save_optim: bool = True
    async_save: bool = False
    """Training goes on while a checkpoint is written: it stops only for the copy to host memory."""
    max_save_failures: int = 3
    """Ours: saves that may fail one after the other, while the run goes on; the last of them ends it."""
    validation_level: Optional[Literal["none", "quick", "tensor", "full"]] = None
    """Ours: how ranks that should hold the same state are compared before a save: none, quick, tensor or full; None: as
    each state component says."""
    verify_checksums: bool = True
    """Ours: read a checkpoint's files once more, against their checksums, before it is loaded."""
    force_resume: bool = False
    """Ours: go on from a checkpoint although arguments that change its meaning differ."""
    convert_from_hf: bool = False
    """Ours: read the weights of hf_model_name_or_path into every rank's shard."""
    hf_model_name_or_path: Optional[str] = None
    """Ours: Hugging Face folder or hub id: config.json, tokenizer, and weights when convert_from_hf."""
    convert_to_hf: bool = False
    """Ours: export to Hugging Face at the end."""
    hf_save_path: Optional[str] = None
    """Ours: where; default SAVE/hf."""
    hf_save_interval: Optional[int] = None
    """Ours: steps between exports while the run goes on, to SAVE/hf_iter_0000100 and so on; a multiple of
    save_interval. None: only the one at the end."""
    max_shard_size: str = "5GB"
    save_merged_model: bool = False
    """Ours: a LoRA run also exports the merged model, to HF/merged."""


@dataclass
class PeftArguments:
    """LoRA; Megatron-Bridge's LoRA(target_modules, dim, alpha, dropout), or its DoRA with use_dora."""

    scheme: Optional[Literal["lora"]] = None
    """None: full fine-tuning."""
    dim: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """HF names (one adapter a projection, as PEFT) or Megatron's (linear_qkv, linear_fc1: one fused adapter);
    all-linear: every projection of the decoder's layers but the router's, the routed experts' and those whose names
    end as theirs (shared experts, dense MLPs between them)."""
    use_rslora: bool = False
    """Ours: scale by alpha / sqrt(dim) in place of alpha / dim (rank-stabilised LoRA)."""
    use_dora: bool = False
    """Train a length for each row of the weight beside the adapter, which then turns the row (DoRA)."""
    lora_A_init_method: Literal["kaiming", "xavier"] = "kaiming"
    """How the adapter's first matrix starts: uniform as PEFT's, or normal as Megatron-Bridge's recipes have it."""


@dataclass
class LoggerArguments:
    log_interval: int = 1
    tensorboard: bool = True
    progress: bool = True
    """A progress bar on a terminal; plain lines elsewhere."""
    report: bool = True
    """Ours: SAVE/report.html at the end."""
    wandb: Optional[bool] = None
    """Ours: log to Weights & Biases; None: when wandb_project is set."""
    wandb_project: Optional[str] = None
    """Weights & Biases project; None with wandb: true: what WANDB_PROJECT says, else theirs for runs without one."""
    wandb_entity: Optional[str] = None
    wandb_exp_name: Optional[str] = None
    """Name of the run there; None: the save folder's."""
    wandb_mode: Optional[Literal["online", "offline", "disabled"]] = None
    """Ours: None: what WANDB_MODE says, else online."""
    callbacks: list[dict[str, Any]] = field(default_factory=list)
    """Ours: callbacks of the user's: dotted paths, or mappings of ``path`` and the keywords of the class."""

    @property
    def uses_wandb(self) -> bool:
        return self.wandb_project is not None if self.wandb is None else self.wandb


@dataclass
class ProfilingArguments:
    use_pytorch_profiler: bool = False
    """--profile: torch's profiler over some steps: a Chrome trace and a table of operations a rank, in SAVE/profile."""
    profile_step_start: int = 10
    """The first step of the trace. Where the run has not all of these steps, they are moved into it, and it says so."""
    profile_step_end: int = 12
    """The step before which the trace ends."""
    profile_ranks: Optional[list[int]] = None
    """Global ranks that are traced; None: all of them (Megatron-Bridge: rank 0)."""
    record_shapes: bool = False
    """Also the shapes of each operation's inputs."""


@dataclass
class RNGArguments:
    seed: int = 1234


@dataclass
class DistArguments:
    distributed_backend: Optional[Literal["nccl", "gloo"]] = None
    """None: nccl (RCCL on ROCm) on a GPU, gloo on a CPU."""
    distributed_timeout_minutes: float = 30
    """How long a rank may go without a sign; then which rank hangs is said, and the run ends."""
    nproc: Optional[int] = None
    """Ours: local ranks that `primus train` starts; None: what the layout needs on CPU, all GPUs on GPU."""
    device: Optional[Literal["cpu", "cuda"]] = None
    """Ours: None: cuda when there is one."""


@dataclass
class TokenizerArguments:
    tokenizer_model: Optional[str] = None
    """Folder or hub id; None: hf_model_name_or_path's."""


@dataclass
class BridgeArguments:
    """One run: SPEC.md's sections. ``sources`` maps every dotted name to where its value came from."""

    framework: str = "megatron_bridge"
    engine: Literal["core", "bridge"] = "core"
    """Ours: core: our trainers on Megatron-Core; bridge: Megatron-Bridge's own finetune (extra ``bridge``)."""
    stage: Literal["pretrain", "sft"] = "pretrain"
    model: ModelArguments = field(default_factory=ModelArguments)
    train: TrainArguments = field(default_factory=TrainArguments)
    optimizer: OptimizerArguments = field(default_factory=OptimizerArguments)
    scheduler: SchedulerArguments = field(default_factory=SchedulerArguments)
    ddp: DDPArguments = field(default_factory=DDPArguments)
    dataset: DatasetArguments = field(default_factory=DatasetArguments)
    checkpoint: CheckpointArguments = field(default_factory=CheckpointArguments)
    peft: PeftArguments = field(default_factory=PeftArguments)
    logger: LoggerArguments = field(default_factory=LoggerArguments)
    profiling: ProfilingArguments = field(default_factory=ProfilingArguments)
    rng: RNGArguments = field(default_factory=RNGArguments)
    dist: DistArguments = field(default_factory=DistArguments)
    tokenizer: TokenizerArguments = field(default_factory=TokenizerArguments)
    mixed_precision: Literal["fp32", "bf16_mixed"] = "fp32"
    """fp32, or bf16 compute with fp32 master weights and gradients."""
    sources: dict[str, str] = field(default_factory=dict, repr=False)
    notes: list[str] = field(default_factory=list, repr=False)
    """Keys that were accepted and change nothing here, each with its place and the reason; a run prints them."""
    shape: dict[str, list] = field(default_factory=dict, repr=False)
    """What a config says of the model's shape: Megatron's name -> [value, place]; compared with config.json."""

    @property
    def save_folder(self) -> Path:
        """checkpoint.save, which ``validate`` has asked for."""
        assert self.checkpoint.save is not None
        return Path(self.checkpoint.save)

    def to_dict(self) -> dict[str, Any]:
        """The sections and ``shape`` as plain nested dicts, without ``sources`` and ``notes``."""
        out = asdict(self)
        del out["sources"], out["notes"]
        return out
