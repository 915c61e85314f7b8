# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 13. Train a tiny Hydra
#
# **Goal:** train a small Hydra by stages, read from its log what became of every path, and keep a path from dying · **Minutes:** 45 · **Difficulty:** medium
#
# You need PyTorch's optimizers and the block formula of the tour:
#
# $$y = x + \sum_p g_p \, \mathrm{path}_p(\mathrm{RMSNorm}(x)).$$
#
# The formula invites a failure. A path of random weights is noise at first; the quickest way to less noise is a smaller gate
# $g_p$; and a path behind a small gate hardly matters any more, whatever it learns. In a prototype of this project most
# expert gates fell to 0.00-0.01 while their routing went on *looking* specialized. So one trains a Hydra
# with an eye on the gates. Here you do, on a model that learns two small tasks in about a minute per run. (`HYDRA_LAB_QUICK=1` in
# the environment cuts the runs short: then the facts are learned and recall is not.)

# %%
import contextlib
import dataclasses
import io
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import torch
import transformers
from IPython.display import display
from plotly.subplots import make_subplots

import hydra_lab
from hydra_lab import figures
from hydra_lab.capture.path_use import measure_path_use
from hydra_lab.config import HydraConfig
from hydra_lab.course import check, check_close, passed, predict, quick, show_source
from hydra_lab.data import DOMAINS
from hydra_lab.data.document import Document
from hydra_lab.data.packing import pack
from hydra_lab.data.tasks import LETTERS, VALUES
from hydra_lab.data.tokenizer import train_tokenizer
from hydra_lab.loading import model_directory
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.path_use import read_path_use
from hydra_lab.presets import PRESETS
from hydra_lab.taps import PATHS
from hydra_lab.training import train
from hydra_lab.training.curriculum import Curriculum
from hydra_lab.training.optimizer import parameter_groups
from hydra_lab.training.plan import TrainingPlan
from hydra_lab.training.presets import (
    CurriculumConfig,
    OptimizerConfig,
    Stage,
    TrainConfig,
    training_preset,
)
from hydra_lab.training.scoring import score
from hydra_lab.training_log import read_training_log

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
STEPS = 40 if quick() else 400

# %% [markdown]
# ## Two tasks
#
# *Recall* is to be read in the context: four pairs, then twelve queries. It is the associative recall of
# [arXiv 2312.04927](https://arxiv.org/abs/2312.04927), cut down to its tokens. *Facts* stand nowhere in the context: a fixed table
# gives each pair of letters its value, and the model must store it. Only answers count in the loss. Chance is one in four
# (once the model guesses among the row's values) and one in eight.

# %%
NUM_KEYS, NUM_SUBJECTS, ROW = 8, 12, 45
subjects = [
    first + second for first in LETTERS[8 : 8 + NUM_SUBJECTS] for second in LETTERS[8 : 8 + NUM_SUBJECTS]
]
table_of_facts = {subject: random.Random(subject).choice(VALUES[:NUM_KEYS]) for subject in subjects}


def recall_row(rng: random.Random) -> Document:
    """Four pairs, then twelve queries, of which the answers are supervised."""
    pairs = dict(zip(rng.sample(LETTERS[:NUM_KEYS], 4), rng.sample(VALUES[:NUM_KEYS], 4), strict=True))
    pieces = [("".join(key + value for key, value in pairs.items()), False)]
    for key in rng.choices(list(pairs), k=12):
        pieces += [(" ?" + key, False), (pairs[key], True)]
    return Document.from_pieces(pieces)


def fact_row(rng: random.Random) -> Document:
    """Eleven facts of the table, of which the values are supervised."""
    pieces = []
    for subject in rng.choices(subjects, k=11):
        pieces += [(" !" + subject, False), (table_of_facts[subject], True)]
    return Document.from_pieces(pieces)


folder = Path(tempfile.mkdtemp())
corpus = folder / "corpus"
tokenizer = train_tokenizer([""], symbols=(*LETTERS, *VALUES, " ?", " !"), vocabulary_size=312)
tokenizer.save_pretrained(corpus / "tokenizer")
drawn = random.Random(1)
packed = {
    "recall": pack((recall_row(drawn) for _ in range(15 * STEPS)), tokenizer),
    "facts": pack((fact_row(drawn) for _ in range(15 * STEPS // 2)), tokenizer),
}
for domain in DOMAINS:  # the data set opens every domain; one without weight is never drawn
    packed.get(domain, packed["recall"]).save(corpus, domain)
held_out = {
    "recall": [recall_row(random.Random(f"held out {i}")) for i in range(64)],
    "facts": [fact_row(random.Random(f"held out {i}")) for i in range(64)],
}
for name, documents in held_out.items():
    print(f"{name:6s} {documents[0].text}")

# %% [markdown]
# ## A size, a curriculum, an optimizer
#
# A size is an entry in a table, a training run one frozen configuration. The paths join one after another (the paper's *staged
# curriculum*): before its stage a path's multiplier is 0, then it rises to 1, and the rise waits while the loss stands
# above where it was when the stage began.

# %%
PRESETS["lesson"] = {
    "hidden_size": 64, "num_hidden_layers": 2, "ssm_state_size": 16, "ssm_head_dim": 32, "ssm_chunk_size": 16,
    "attention_every": 2, "attention_num_heads": 2, "attention_num_kv_heads": 1, "attention_head_dim": 32,
    "attention_window": 32, "attention_block_size": 16, "attention_num_selected": 1,
    "moe_layers": [0], "moe_num_experts": 4, "moe_hidden_size": 64, "moe_chunk_size": 8,
    "workspace_layers": [1], "workspace_num_slots": 4, "workspace_slot_size": 32, "workspace_key_size": 16,
    "workspace_chunk_size": 16, "memory_layers": [1], "memory_num_keys": [16, 16], "memory_num_heads": 2,
    "memory_key_size": 16, "memory_top_k": 4,
}  # fmt: skip


def configuration(begins: tuple[float, ...], gates: float = 0.1) -> TrainConfig:
    """A run of this lesson.

    Args:
        begins: when each of `PATHS` joins, as a fraction of the run.
        gates: learning-rate factor of the gates.
    """
    mixture = {"recall": 0.5, "facts": 0.5}
    return TrainConfig(
        model="lesson",
        sequence_length=ROW,
        rows_per_step=16,
        max_steps=STEPS,
        curriculum=CurriculumConfig(
            stages=tuple(Stage(path=p, begin=b, weights=mixture) for p, b in zip(PATHS, begins, strict=True)),
            ramp=0.05,
            max_hold=0.05,
        ),
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=10, decay=0.3, gates=gates),
        bf16=False,
        save_every=STEPS,
        log_every=max(2, STEPS // 40),
    )


STAGED = (0.0, 0.1, 0.2, 0.3, 0.4)
AT_ONCE = (0.0,) * len(PATHS)
staged_config = configuration(STAGED)
plan = TrainingPlan.of(staged_config, preset="lesson", seed=0, max_steps=STEPS)
print("first step of each path:", plan.begins)
show_source(Curriculum.advance)

# %% [markdown]
# The learning rate warms up over $s_w$ steps, stays, and falls from step $s_d$ to the end $S$ as $1 - \sqrt{\cdot}$
# ([arXiv 2405.18392](https://arxiv.org/abs/2405.18392) found that shape better than a line), to $\varphi$ times its peak:
#
# $$f(s) = \begin{cases} (s + 1) / s_w & s < s_w \\ 1 & s_w \le s < s_d \\ \varphi + (1 - \varphi)\left(1 - \sqrt{(s - s_d) / (S - s_d)}\right) & s_d \le s . \end{cases}$$

# %%
steps = np.arange(STEPS)
curriculum = Curriculum(staged_config.curriculum, plan)
multipliers = []
for step in steps:  # as if the loss never rose; in the run it may, and then a rise holds
    curriculum.advance(int(step))
    multipliers.append(curriculum.scales())
schedule = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
rates = [plan.learning_rate_factor(int(step)) for step in steps]
schedule.add_scatter(
    x=steps, y=rates, name="learning rate", line={"color": "#1b1f24", "width": 3}, row=1, col=1
)
for path, colour, dash in zip(
    PATHS, figures.colours(5), ("solid", "dash", "dot", "dashdot", "longdash"), strict=True
):
    line = {"color": colour, "dash": dash}
    schedule.add_scatter(x=steps, y=[m[path] for m in multipliers], name=path, line=line, row=2, col=1)
schedule.update_yaxes(title_text="f(s)", row=1, col=1)
schedule.update_yaxes(title_text="multiplier", row=2, col=1)
schedule.update_xaxes(title_text="step", row=2, col=1)
schedule.update_layout(
    template=figures.template("light"), height=420, margin_t=60, title=f"The plan of {STEPS} steps: all paths are on before the decay begins"
)  # fmt: skip
schedule

# %% [markdown]
# ### Exercise 13.1: the learning-rate schedule
#
# Write `rate_factor(step, warmup, decay_begin, max_steps, floor)`: the factor $f(s)$ of one step (an int counted from 0), a float.


# %% tags=["exercise"]
def rate_factor(step, warmup, decay_begin, max_steps, floor):
    """Learning rate of a step relative to its peak: warm-up, stable, 1 - sqrt decay to `floor`."""
    # BEGIN SOLUTION: three cases: step < warmup, step < decay_begin, and the decay
    if step < warmup:
        return (step + 1) / warmup
    if step < decay_begin:
        return 1.0
    done = (step - decay_begin) / (max_steps - decay_begin)
    return floor + (1 - floor) * (1 - done**0.5)
    # END SOLUTION


# %% tags=["check"]
check(
    rate_factor(0, 10, 70, 100, 0.1) != 0, "Step 0 would train at rate 0: the warm-up is (step + 1) / warmup."
)
check_close(rate_factor(0, 10, 70, 100, 0.1), 0.1, "The first of ten warm-up steps has a tenth of the peak.")
check_close(rate_factor(10, 10, 70, 100, 0.1), 1.0, "After the warm-up the rate stands at its peak.")
check_close(rate_factor(100, 10, 70, 100, 0.1), 0.1, "At the end the factor is the floor, not 0.")
check(
    abs(rate_factor(85, 10, 70, 100, 0.0) - 0.5) > 1e-6,
    "This decay is a line: take the square root of the share of the decay that is over.",
)
for decay, floor in ((0.3, 0.0), (0.5, 0.2)):
    optimizer = OptimizerConfig(warmup_steps=7, decay=decay, floor=floor)
    of = TrainingPlan.of(staged_config.replace(optimizer=optimizer), preset="lesson", seed=0, max_steps=50)
    mine = [rate_factor(step, of.warmup_steps, of.decay_begin, of.max_steps, of.floor) for step in range(50)]
    check_close(
        mine,
        [of.learning_rate_factor(step) for step in range(50)],
        "Some steps differ from the library's plan.",
    )
passed("13.1")

# %% [markdown]
# ## Not every parameter learns at one rate
#
# A token reads a few rows of the memory's value table, so each row gets a gradient in few steps: the table learns three
# times as fast. A gate is one number in front of a whole path: it learns at a tenth. Matrices are trained by Muon, everything else by
# AdamW. The library sorts parameters into groups:

# %%
tiny = HydraForCausalLM(HydraConfig.from_preset("lesson", vocab_size=len(tokenizer)))
print(f"{sum(p.numel() for p in tiny.parameters()):,} parameters")
for group in parameter_groups(tiny, OptimizerConfig()):
    size = sum(parameter.numel() for parameter in group["params"])
    print(
        f"{group['name']:22s} lr {group['lr']:.4f}  decay {group['weight_decay']:.1f}  {size:7,} numbers, such as {group['param_names'][0]}"
    )

# %% [markdown]
# ### Exercise 13.2: groups by hand
#
# Write `three_groups(model, lr)` for `torch.optim.AdamW`: a list of three dicts, each with `params` (a list) and `lr`. The value tables
# (names ending in `.memory.values`) learn at `3 * lr`, the gates $g_p$ (one number per path, `model.layers.<i>.gates.<path>`) at `0.1 * lr`,
# in this order; then all other parameters at `lr`. Use `model.named_parameters()`.


# %% tags=["exercise"]
def three_groups(model, lr):
    """Parameter groups for AdamW: value tables, gates, the rest."""
    # BEGIN SOLUTION: sort model.named_parameters() by name into three lists, and give each its learning rate
    values, gates, rest = [], [], []
    for name, parameter in model.named_parameters():
        if name.endswith(".memory.values"):
            values.append(parameter)
        elif ".gates." in name:
            gates.append(parameter)
        else:
            rest.append(parameter)
    return [
        {"params": values, "lr": 3 * lr},
        {"params": gates, "lr": 0.1 * lr},
        {"params": rest, "lr": lr},
    ]
    # END SOLUTION


# %% tags=["check"]
mine = three_groups(tiny, 1e-2)
check(mine is not None and len(mine) == 3, "Return a list of three groups.")
values, gates, rest = (list(group["params"]) for group in mine)
names = {id(parameter): name for name, parameter in tiny.named_parameters()}
check(
    len(values) == 1, f"This model has one value table, and the first group holds {len(values)} parameters."
)
beta = tiny.get_parameter("model.layers.1.memory.gate.weight")
check(
    all(gate is not beta for gate in gates),
    "memory.gate is no path's gate: it computes beta for every token. A path's gate has `.gates.` in its name.",
)
check(
    len(gates) == sum(len(block.paths) for block in tiny.model.blocks),
    "There is one gate for each block and path; the workspace's and the memory's gates count too.",
)
counted = [id(parameter) for group in (values, gates, rest) for parameter in group]
check(len(counted) == len(set(counted)), "A parameter stands in two groups: it would be updated twice.")
missing = sorted(name for key, name in names.items() if key not in counted)
check(not missing, f"These parameters would never be trained: {missing[:3]}")
check_close(
    [group["lr"] for group in mine], [3e-2, 1e-3, 1e-2], "The rates are 3 lr, 0.1 lr and lr, in this order."
)
torch.optim.AdamW(mine)
passed("13.2")

# %% [markdown]
# ## Train
#
# `hydra-lab train --preset demo --out runs/demo` is the same function with a preset's configuration. It leaves
# checkpoints, a log of one line per few steps, and at the end a model that `hydra_lab.load` reads.


# %%
def run(name: str, config: TrainConfig, **options):
    """Train into `folder/name`; returns the trained model and the log."""
    started = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):  # one line per log line
        result = train("lesson", folder / name, corpus=corpus, config=config, tensorboard=False, **options)
    print(f"{name}: {result.step} steps in {time.perf_counter() - started:.0f} s")
    return hydra_lab.load(result.model)[0], read_training_log(folder / name)


def accuracy(model: HydraForCausalLM) -> dict[str, float]:
    """Share of the supervised held-out tokens that are the model's likeliest."""
    right = {}
    for domain, documents in held_out.items():
        rows = pack(documents, tokenizer)
        ids, supervised = (each.reshape(-1, ROW) for each in (rows.tokens, rows.mask))
        hits = np.stack([scores.hit for scores in score(model, ids.astype(int).tolist())])
        right[domain] = float(hits[supervised[:, 1:] == 1].mean())
    return right


staged, staged_log = run("staged", staged_config)
figures.training_loss(staged_log)

# %%
print("held-out answers right:", {name: f"{share:.0%}" for name, share in accuracy(staged).items()})
display(figures.expert_load_over_training(staged_log))
display(figures.memory_use_over_training(staged_log))

# %% [markdown]
# Each column of the load is the share of the chunks' places that an expert got since the line before. The Switch loss
# ([arXiv 2101.03961](https://arxiv.org/abs/2101.03961), equation 4) pulls the shares towards 1/4. Use of the memory says how many of its 256
# addresses were touched at all, and how far the gate $\beta$ stood open.
#
# ### Exercise 13.3: dead experts in a log
#
# Write `dead_experts(log, lines, share)`: the sorted list of `(block, expert)` whose mean load over the last `lines` log
# lines lies below `share`. `log.expert_load[block]` is an array [log lines, experts], NaN while the path was switched off; a block that is off in
# one of these lines has no dead experts yet.


# %% tags=["exercise"]
def dead_experts(log, lines, share):
    """(block, expert) whose mean load over the last `lines` log lines lies below `share`."""
    # BEGIN SOLUTION: average the last lines of each block's load over the lines, and compare with share
    return sorted(
        (block, expert)
        for block, load in log.expert_load.items()
        for expert, mean in enumerate(load[-lines:].mean(axis=0).tolist())
        if mean < share
    )
    # END SOLUTION


# %% tags=["check"]
made_up = {
    0: np.array([[0.5, 0.0, 0.5]] * 3 + [[0.5, 0.3, 0.2]] * 3),  # expert 1 woke up
    4: np.array([[0.4, 0.3, 0.3]] + [[0.6, 0.4, 0.0]] * 4 + [[0.6, 0.38, 0.02]]),  # expert 2 fell asleep
    2: np.array([[np.nan] * 3] * 2 + [[0.5, 0.5, 0.0]] * 3 + [[0.9, 0.0, 0.1]]),  # a noisy last line
}
fake = dataclasses.replace(staged_log, expert_load=made_up)
found = dead_experts(fake, 3, 0.02)
check(found is not None, "Does the function return the list?")
check((0, 1) not in found, "Expert 1 of block 0 was dead early and is not now: take the last lines only.")
check(
    (2, 1) not in found, "Expert 1 of block 2 is absent from the last line only: average before you compare."
)
check(
    (4, 2) in found,
    "Expert 2 of block 4 got 0, 0 and 2% in the last three lines, on average less than 2%: it counts.",
)
check([tuple(each) for each in found] == [(4, 2)], f"Only (4, 2) is dead there; you found {found}.")
check(
    dead_experts(fake, 5, 0.03) == [(4, 2)],
    "Block 2 was off in one of the last five lines: report nothing for it.",
)
asleep = {**made_up, 0: made_up[4]}
found = dead_experts(dataclasses.replace(fake, expert_load=asleep), 3, 0.02)
check(found == [(0, 2), (4, 2)], "Report every block, sorted by block and expert.")
demo_log = read_training_log(model_directory("demo"))
print("dead in the demo's training, below 1% over the last 20 lines:", dead_experts(demo_log, 20, 0.01))
passed("13.3")

# %% [markdown]
# ## A path that cannot start
#
# Write a path as $g\,W h_\theta$, with $W$ its output projection and $\delta = \partial \ell / \partial y$ what comes back. For one token
#
# $$\frac{\partial \ell}{\partial g} = \langle \delta, W h_\theta \rangle, \qquad \frac{\partial \ell}{\partial W} = g\,\delta\,h_\theta^\top, \qquad
# \frac{\partial \ell}{\partial \theta} = g\, \left(\frac{\partial h_\theta}{\partial \theta}\right)^{\!\top} W^\top \delta .$$
#
# Hydra wants paths to join silently, with $g\,W h = 0$ at first. There are three ways to have it.

# %% tags=["predict"]
cannot_start = predict(
    "Which of these starts of the moe path never learns anything, at any learning rate?",
    ["g = 1, W = 0", "g = 0, W random", "g = 0, W = 0", "each of them learns"],
)

# %%
batch = torch.from_numpy(packed["recall"].tokens[: 8 * ROW].astype(np.int64)).view(8, ROW)


def gradient_norms(gate: float, random_output: bool) -> dict[str, float]:
    """Gradient norms of block 0's experts at the start: of the gate g, of the output W, and of what lies before it."""
    torch.manual_seed(0)
    model = HydraForCausalLM(HydraConfig.from_preset("lesson", vocab_size=len(tokenizer)))
    block = model.model.blocks[0]
    with torch.no_grad():
        block.gates["moe"].fill_(gate)
        if random_output:
            torch.nn.init.normal_(block.moe.down_proj, std=block.moe.down_proj.shape[-1] ** -0.5)
    model(input_ids=batch, labels=batch).language_loss.backward()
    parts = {"g": block.gates["moe"], "W": block.moe.down_proj, "theta": block.moe.gate_up_proj}
    return {name: float(part.grad.norm()) for name, part in parts.items()}


starts = {"g = 1, W = 0": (1.0, False), "g = 0, W random": (0.0, True), "g = 0, W = 0": (0.0, False)}
dead = []
for name, start in starts.items():
    norms = gradient_norms(*start)
    print(f"{name:16s} gradient norms: " + "   ".join(f"{part} {norm:.1e}" for part, norm in norms.items()))
    dead += [name] * (max(norms.values()) == 0)
cannot_start.reveal(
    dead[0] if dead else cannot_start.options[3],
    "Every gradient of this path is zero, so it stays where it is. One of g and W may be zero, not both: the library starts "
    "with W = 0 and g = 1, so that the first step moves W and nothing else of the path.",
)

# %% [markdown]
# ## A path that dies
#
# The authors' prototype starts the gates of ssm, attention and experts at 1.0, 0.15 and 0.5. We take the small one for every
# path, with random output projections and gates that learn as fast as all else, and compare with the library's start: the same
# rows, the same optimizer, all paths on from the first step.
#
# | | gates $g$ | output projections $W$ | rate of the gates |
# |---|---|---|---|
# | ours | 1.0 | zero | a tenth |
# | small gates | 0.15 | random | as all others |


# %%
def small_gates() -> Path:
    """Directory of an untrained model with gates of 0.15 and random output projections."""
    torch.manual_seed(0)
    ends = {key: getattr(tokenizer, key) for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    model = HydraForCausalLM(
        HydraConfig.from_preset("lesson", vocab_size=len(tokenizer), gate_init=0.15, **ends)
    )
    for name, parameter in model.named_parameters():
        if name.split(".")[-1] != "bias" and "proj" in name and not parameter.any():
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    directory = folder / "small_gates_start"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


# %% tags=["predict"]
small_gate = predict(
    "In the run with small gates, where does the gate of the experts (0.15 at the start) end?",
    [
        "above 0.2: it opens as the experts learn",
        "between 0.075 and 0.2",
        "below 0.075, less than half of its start",
    ],
)

# %%
ours, ours_log = run("ours", configuration(AT_ONCE))
small, small_log = run("small gates", configuration(AT_ONCE, gates=1.0), init_from=small_gates())
display(figures.path_gates(small_log))
final = small_log.gates[0, "moe"][-1]
small_gate.reveal(
    small_gate.options[0 if final > 0.2 else 2 if final < 0.075 else 1],
    f"It ends at {final:.3f}; with our start, at {ours_log.gates[0, 'moe'][-1]:.3f}.",
)

# %%
uses = {}
for name, model, log in (("ours", ours, ours_log), ("small gates", small, small_log)):
    uses[name] = measure_path_use(model, tokenizer, held_out, num_tokens=ROW)
    load = log.expert_load[0][-5:].mean(axis=0)
    entropy = -(load * np.log(load.clip(1e-9))).sum() / np.log(len(load))
    right = ", ".join(f"{task} {share:.0%}" for task, share in accuracy(model).items())
    print(f"{name}: right answers {right}")
    print(f"   load of the experts {load.round(2).tolist()}, entropy {entropy:.2f} of 1")
    for path in ("moe", "memory"):
        print("   " + uses[name].describe(path))
    figure = figures.path_use(uses[name])
    figure.layout.title.text = f"{name.capitalize()}. {figure.layout.title.text}"
    display(figure)

# %% [markdown]
# Both models answer equally well, so the loss gives no alarm. The load gives none either: the load-balance loss trains the router
# whether anyone listens to its path or not, and the choices of the closed path are spread as evenly as one could wish. Only the gate
# and the *cost of cutting* tell. A path that dies is no error of the optimizer; it is the quickest way down. What it would have been good
# for later, on harder text, is then not learned.
#
# Read the memory's row as well. It was open from the first step, and its addresses were read; where cutting it costs nothing, the facts
# went into the weights of other paths. So few of them fit there with ease, and a memory is used only for more than that.
#
# In the full run our start gives the experts a part of the work that the other model does without them. In the quick one the small
# gate is still on its way down, and neither model uses its experts yet, however wide the gate: an open gate is a chance, not a use.
#
# AdamW and Muon divide a gradient by its own size, so behind a small gate the weights still move as fast as ever. What shrinks
# with $g$ is the effect of their moves on the output, $g\,\Delta W h$.
#
# ## Do the stages pay?
#
# The run `ours` above differs from the first one, `staged`, in the stages alone: rows, optimizer, number of steps and, but for chance, the start are the same.

# %% tags=["predict"]
stages_pay = predict(
    "Training loss, averaged over the whole run but its first tenth: staged, or all paths at once?",
    ["staged is lower by more than 5%", "within 5%", "all at once is lower by more than 5%"],
)

# %%
curves = go.Figure()
averages = {}
for (name, log), colour, dash in zip(
    (("staged", staged_log), ("all at once", ours_log)), figures.colours(2), ("solid", "dash"), strict=True
):
    averages[name] = float(log.language_loss[len(log.step) // 10 :].mean())
    curves.add_scatter(x=log.step, y=log.language_loss, name=name, line={"color": colour, "dash": dash})
for path, step in plan.begins.items():
    curves.add_vline(
        x=step,
        line={"color": "#8b949e", "width": 1, "dash": "dot"},
        annotation_text=path,
        annotation_textangle=-90,
    )
curves.update_layout(
    template=figures.template("light"), height=380, margin_t=60, xaxis_title="step",
    yaxis_title="loss, nats per supervised token", yaxis_range=[0, 3],
    title="The same rows with and without stages (one run each); dotted: a path joins the staged run",
)  # fmt: skip
display(curves)
print({name: round(loss, 3) for name, loss in averages.items()})
ratio = averages["staged"] / averages["all at once"]
stages_pay.reveal(
    stages_pay.options[0 if ratio < 0.95 else 1 if ratio < 1 / 0.95 else 2],
    f"The staged run's average is {ratio:.2f} times the other's. Until a path joins, the run makes do without it.",
)

# %% [markdown]
# The curriculum is meant for stability, and nothing here was unstable. What it does at any size is to give the parts that come first
# the first choice of what to learn. That is why the demo's facts enter its mixture only together with the memory: learned earlier,
# they would sit in the state-space path.
#
# ### Exercise 13.4: a curriculum without stages
#
# Write `at_once(config)`: the `TrainConfig` whose paths all begin at step 0 and which is otherwise that of `config` (same stages in the
# same order, same optimizer). The configurations are frozen: use `dataclasses.replace`, also on each `Stage`.


# %% tags=["exercise"]
def at_once(config):
    """The configuration with every stage at the beginning of the run."""
    # BEGIN SOLUTION: replace begin in every stage, the stages in the curriculum, the curriculum in the configuration
    stages = tuple(dataclasses.replace(stage, begin=0.0) for stage in config.curriculum.stages)
    return dataclasses.replace(config, curriculum=dataclasses.replace(config.curriculum, stages=stages))
    # END SOLUTION


# %% tags=["check"]
for before in (staged_config, training_preset("demo")):
    after = at_once(before)
    check(
        isinstance(after, TrainConfig), "Return a TrainConfig: replace the curriculum in the configuration."
    )
    check(before.curriculum.stages[-1].begin > 0, "The given configuration was changed: make a new one.")
    check(
        [stage.path for stage in after.curriculum.stages]
        == [stage.path for stage in before.curriculum.stages],
        "A stage is missing or moved: keep all of them in their order.",
    )
    check(
        all(
            (old.weights, old.learning_rates) == (new.weights, new.learning_rates)
            for old, new in zip(before.curriculum.stages, after.curriculum.stages, strict=True)
        ),
        "A stage lost its mixture or its learning rates: replace its beginning only.",
    )
    check(all(stage.begin == 0 for stage in after.curriculum.stages), "Some stage still begins later.")
    rule = Curriculum(after.curriculum, TrainingPlan.of(after, preset="lesson", seed=0, max_steps=100))
    rule.advance(0)
    check(set(rule.scales().values()) == {1.0}, "At step 0 every multiplier should be 1.")
    kept = dataclasses.replace(after, curriculum=before.curriculum)
    check(
        kept == before and after.curriculum.ramp == before.curriculum.ramp,
        "Something besides the beginnings changed.",
    )
passed("13.4")

# %% [markdown]
# With all stages at 0 the mixture and the learning rates of the *last* one hold from the first step: for the demo's preset this changes the data
# as well. An ablation of stages alone needs, as here, the same mixture in all of them.
#
# ## Where this breaks
#
# - One run per setting, seeds fixed, two toy tasks. (The full lesson with seed 1, tried once, gave the same answers.) The order of two losses can turn with the seed, the number of steps or the learning rate; the gates'
#   fall is what the larger prototype showed too (three of four expert gates at 0.00-0.01 after 7 M tokens).
# - An open gate is not use. In the prototype, gates held near one kept workspace (7% of the update) and memory (1%) at work that cost 0.00 nats
#   to cut. A path is used when something needs it. The demo, trained by these rules, needs them unequally:

# %%
demo_use = read_path_use(model_directory("demo"))
for path in demo_use.paths:
    print(demo_use.describe(path))

# %% [markdown]
# - Muon is not better everywhere: two state-space blocks alone, recalling single letters, were right in 92% after 250 steps of AdamW
#   and at chance after 450 with Muon (one seed each).
# - The paper reports no such check, and in its prototype the experts are all computed and then weighted: there a closed gate saves nothing and shows nowhere.

# %% [markdown]
# ## Next
#
# - `make demo-model` repeats the demo's training (an hour and a half on two cores); `hydra-lab dashboard` shows a run's log while it goes on.
# - Lesson 11 asks whether the experts of a trained model specialize; lesson 14 shows pictures of paths that nobody uses.
