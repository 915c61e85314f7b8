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
# # 10. Ablate, force, patch
#
# **Goal:** measure what a part of a model does to an answer by ablating, forcing and patching it, and say when each of the three misleads · **Minutes:** 50 · **Difficulty:** hard
#
# You need lesson 9 (sites, hooks, gradients) and the idea of a residual stream to which all paths add.
#
# Every causal question about a model has one form: run it with a part's value $c$ replaced by another value $\tilde c$, and compare a
# number $m$ of the output, $m(\tilde c) - m(c)$. The three methods differ in $\tilde c$ alone. **Ablation** takes a value that
# says nothing. **Forcing** takes the value of a decision that we choose. **Patching** takes what the part computed on *another
# input*. What the answer means depends on the choice, and most wrong conclusions come from not looking at it.

# %%
import random
from collections import defaultdict
from contextlib import contextmanager

import ipywidgets
import plotly.graph_objects as go
import torch
from IPython.display import display

import hydra_lab
from hydra_lab import figures
from hydra_lab.attribution import activation_patching, block_paths, logit_difference, path_patching
from hydra_lab.attribution.patching import recovered, run_and_keep
from hydra_lab.attribution.sites import Site
from hydra_lab.course import check, check_close, passed, predict, quick, show_source
from hydra_lab.data.sample_texts import read_sample_texts
from hydra_lab.data.tasks import VALUES, make_recall_problem, query
from hydra_lab.figures.theme import colours, finish, hatching
from hydra_lab.interventions import ForceExperts, intervened, parse
from hydra_lab.loading import model_directory

torch.set_num_threads(1)
model, tokenizer = hydra_lab.load("demo")
SITES = block_paths(model)
print("what each path adds to the residual stream is a site:", ", ".join(SITES))
show_source(Site.hook)


# %%
@contextmanager
def replaced(site, change):
    """Within the context, the path at `site` adds `change(contribution)` instead of its contribution, [B, L, D]."""
    handle = Site.find(model, site).hook(change)
    try:
        yield
    finally:
        handle.remove()


# %% [markdown]
# ## Ablate: with what?
#
# First the cost of having no information from a path, on held-out text: by how much does the loss rise? A path must add
# *something*, and there are three usual choices for a token's $\tilde c$:
#
# - **zero**, $\tilde c = 0$: the path is missing;
# - **mean**, $\tilde c = \mu$, the average of $c$ over tokens: it is there and always says the same;
# - **resample**, $\tilde c = c'$, what it said for another token: it says something usual, at the wrong place.
#
# What should we expect? Let $\Sigma$ be the covariance of $c$ over tokens and expand the loss of a token to second order, $\mathcal{L}(\tilde c)
# \approx \mathcal{L}(c) + \langle g, \tilde c - c\rangle + \tfrac12 (\tilde c - c)^\top H (\tilde c - c)$. Step by a fraction $\pm\alpha$ of the way and average the two
# signs: the gradient cancels. If $H$ did not depend on $c$, the mean over tokens of $(\tilde c - c)(\tilde c - c)^\top$ would give
#
# $$K_\text{mean} = \tfrac12 \operatorname{tr}(H\Sigma), \qquad K_\text{zero} = K_\text{mean} + \tfrac12 \mu^\top H \mu, \qquad
#   K_\text{resample} = 2\, K_\text{mean}.$$
#
# So zero ablation also charges for the absence of a constant, which carries no information. And resampling charges twice:
# once for what is missing, once for what is wrong. (Li and Janson 2024,
# [arXiv 2409.09951](https://arxiv.org/abs/2409.09951), compare such choices and look for the best constant.)

# %% tags=["predict"]
costliest = predict(
    "The experts of block 0, on code, prose and facts. Which ablation raises the loss most?",
    ["zero", "mean", "resample", "all three alike (within 10%)"],
)

# %%
DOMAINS = ("code", "prose", "facts")
texts = read_sample_texts(model_directory("demo"))
num_texts = 1 if quick() else 2


def rows(domain, count=num_texts, length=128):
    """The first tokens of a domain's held-out texts, [count, length]."""
    return torch.tensor([tokenizer(text)["input_ids"][:length] for text in texts[domain][:count]])


@torch.no_grad()
def loss(ids):
    """Mean loss of the tokens after the first, nats per token."""
    log_probability = model(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    return -log_probability.gather(-1, ids[:, 1:, None]).mean().item()


natural = torch.cat([rows(domain) for domain in DOMAINS])
whole = loss(natural)
shuffled = torch.randperm(natural.numel(), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    contributions, _ = run_and_keep(model, [Site.find(model, site) for site in SITES], natural, None)
ABLATIONS = {
    "zero": torch.zeros_like,
    "mean": lambda c: c.mean((0, 1), keepdim=True).expand_as(c),
    "resample": lambda c: c.flatten(0, 1)[shuffled].view_as(c),
}


def cost(site, ablation, fraction=1.0):
    """Rise of the loss when the contribution moves this fraction of the way to its replacement, nats per token."""
    target = ABLATIONS[ablation](contributions[site])
    with replaced(site, lambda c: c + fraction * (target - c)):
        return loss(natural) - whole


costs = {name: [cost(site, name) for site in SITES] for name in ABLATIONS}
figure = go.Figure()
for index, (name, values) in enumerate(costs.items()):
    figure.add_trace(
        go.Bar(
            y=[site.removeprefix("layers.").replace(".", " ") for site in SITES], x=values, name=name, orientation="h",
            text=[f"{value:.2f}" for value in values], textposition="outside", textfont={"size": 9},
            marker={"color": colours(3)[index], "pattern": hatching(index, "light")},
        )
    )  # fmt: skip
figure.update_layout(barmode="group", bargap=0.2)
figure.update_xaxes(title_text="rise of the loss (nats per token)")
figure.update_yaxes(title_text="block and path", autorange="reversed", showgrid=False)
finish(
    figure, title="One path ablated in three ways: resampling mostly costs most", theme="light", height=640,
    subtitle=f"{', '.join(DOMAINS)}; mean over n = {natural[:, 1:].numel():,} tokens of {len(natural)} texts, "
    f"loss of the whole model {whole:.2f}",
)  # fmt: skip
display(figure)

# %%
experts = {name: values[SITES.index("layers.0.moe")] for name, values in costs.items()}
alike = max(experts.values()) - min(experts.values()) < 0.1 * max(experts.values())
costliest.reveal(
    costliest.options[3] if alike else max(experts, key=experts.get),
    "Zero {zero:.2f}, mean {mean:.2f}, resample {resample:.2f} nats per token. To hear what was meant for another token is worse than "
    "to hear nothing.".format(**experts),
)

# %% [markdown]
# The second-order argument speaks of small steps. With $\alpha = 0.3$ and both signs, in units of a whole step:

# %%
ALPHA = 0.3
print(f"{'':16s} K_zero  K_mean  K_resample  resample/mean  share of the constant in |c|^2")
for site in ("layers.0.ssm", "layers.0.moe", "layers.5.ssm"):
    K = {name: sum(cost(site, name, a) for a in (ALPHA, -ALPHA)) / (2 * ALPHA**2) for name in ABLATIONS}
    c = contributions[site]
    constant = (c.mean((0, 1)).square().sum() / c.square().sum(-1).mean()).item()
    print(f"{site:16s} {K['zero']:6.3f}  {K['mean']:6.3f}  {K['resample']:10.3f}  {K['resample'] / K['mean']:13.2f}  {constant:.2f}")  # fmt: skip
lengths = contributions["layers.0.ssm"].norm(dim=-1)
mean_length = contributions["layers.0.ssm"].mean((0, 1)).norm()
print(
    f"lengths of what the ssm of block 0 adds: {lengths.min():.1f} to {lengths.max():.1f}; of its mean: {mean_length:.1f}"
)

# %% [markdown]
# The ratio comes out near two, as it should if $H$ is about the same for all tokens. It is not quite: where $K_\text{zero}$ is below
# $K_\text{mean}$, which a positive $H$ forbids, $H$ does depend on $c$. And note the last line: an average is a value
# that no token has. It is shorter than the shortest real contribution, so it, too, leads the model where it has never been.
# Resampling keeps a path's own distribution and breaks its agreement with all others. *No replacement is neutral*: say
# which one you took.
#
# ## Force
#
# Forcing asks what a *decision* does. `hydra_lab.interventions` has a vocabulary for it that can be read, written and
# kept; the library, the command line (`--intervene`) and the dashboard share it. Each change says what becomes of the rest of
# the decision: a chunk that is forced to an expert still needs weights for it.

# %%
changes = parse("moe[0].force(expert=5); memory[*].beta(value=0.0); ssm[2].scale(factor=0.5)")
for change in changes:
    print(f"{change!s:40s} {change.to_dict()}")
show_source(ForceExperts)

# %% tags=["predict"]
remove_or_force = predict(
    "Block 0 on code: its most used expert is (a) removed, its weight going to the chunk's other one, or (b) forced to serve every "
    "chunk alone. Which raises the loss more?",
    ["removing it", "forcing it", "both alike (within 10%)"],
)

# %%
code = rows("code", 2 if quick() else 4, length=256)
code_loss = loss(code)
chosen = hydra_lab.record(model, code)["layers.0.moe.routing"].experts
share = torch.bincount(chosen.flatten(), minlength=model.config.moe_num_experts) / chosen[..., 0].numel()
effects = {"ablate": [], "force": []}
for action, values in effects.items():
    for expert in range(model.config.moe_num_experts):
        with intervened(model, f"moe[0].{action}(expert={expert})"):
            values.append(loss(code) - code_loss)
print("expert   chunks that use it   ablated   forced alone")
for expert, (ablated, forced) in enumerate(zip(effects["ablate"], effects["force"], strict=True)):
    print(f"{expert:6d}   {share[expert]:18.0%}   {ablated:+7.3f}   {forced:+12.3f}")
most_used = int(share.argmax())
ablated, forced = effects["ablate"][most_used], effects["force"][most_used]
close = abs(ablated - forced) < 0.1 * max(abs(ablated), abs(forced))
remove_or_force.reveal(
    remove_or_force.options[2 if close else 0 if ablated > forced else 1],
    f"The loss changes by {ablated:+.3f} nats per token when expert {most_used} is removed, by {forced:+.3f} when it works alone. The two "
    "answer different questions: whether the others can replace it, and whether it can replace the others.",
)

# %% [markdown]
# Try changes of your own: the likeliest next tokens, untouched and changed.


# %%
def compare(prompt: str, change: str) -> None:
    """Print the five likeliest next tokens, without and with a change."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    try:
        for name, wanted in (("untouched", ()), ("changed", tuple(parse(change)))):
            with torch.no_grad(), intervened(model, *wanted):
                best = model(ids).logits[0, -1].softmax(-1).topk(5)
            print(f"{name:10s}", ", ".join(f"{tokenizer.decode(i)!r} {p:.2f}" for p, i in zip(*best, strict=True)))  # fmt: skip
    except ValueError as error:
        print(error)


wide = ipywidgets.Layout(width="90%")
prompt_box = ipywidgets.Text("Q: country of Osaka? A:", continuous_update=False, layout=wide)
change_box = ipywidgets.Text("moe[0].force(expert=5)", continuous_update=False, layout=wide)
display(prompt_box, change_box)
display(ipywidgets.interactive_output(compare, {"prompt": prompt_box, "change": change_box}))

# %% [markdown]
# ## A pair of texts and a metric
#
# An ablation says that a part matters for *something*. Patching asks for one thing, by contrast: two texts that differ in it alone.
# Here the **clean** text gives six names a value each and asks for the third; the **corrupted** one gives it another value.

# %%
num_pairs = 4 if quick() else 8


def make_pairs(count, num_names=6):
    """Clean and corrupted texts [N, L] of one length, and the answer to each [N]."""
    rng, by_length = random.Random(0), defaultdict(list)
    while True:
        problem = make_recall_problem(rng, num_pairs=num_names, filler=False)
        asked = list(problem.pairs)[num_names // 2 - 1]
        right = problem.pairs[asked]
        wrong = rng.choice([value for value in VALUES if value not in problem.pairs.values()])
        clean_text = problem.given()
        corrupted_text = clean_text.replace(f"{asked} ={right};", f"{asked} ={wrong};")
        pair = [tokenizer(text + query(asked))["input_ids"] for text in (clean_text, corrupted_text)]
        answers = [tokenizer(value)["input_ids"][0] for value in (right, wrong)]
        same_length = by_length[len(pair[0])]
        same_length.append((*pair, *answers))
        if len(same_length) == count:
            return [torch.tensor(part) for part in zip(*same_length, strict=True)]


clean, corrupted, right, wrong = make_pairs(num_pairs)
print("clean:    ", tokenizer.decode(clean[0]), "->", tokenizer.decode(right[0]))
print("corrupted:", tokenizer.decode(corrupted[0]), "->", tokenizer.decode(wrong[0]))
metric = logit_difference(right, wrong)
with torch.no_grad():
    clean_value, corrupted_value = (metric(model(ids).logits) for ids in (clean, corrupted))
print(f"logit of the clean answer less that of the corrupted one: {clean_value.mean():+.1f} and {corrupted_value.mean():+.1f} (n = {num_pairs})")  # fmt: skip

# %% [markdown]
# The metric is the difference of two logits. A probability saturates: near 1, half of the evidence can go unseen. A single
# logit also moves with everything that raises all values alike. To compare sites and models one rescales it, so that the
# corrupted run is 0 and the clean one 1 (Zhang and Nanda 2023, [arXiv 2309.16042](https://arxiv.org/abs/2309.16042)):
#
# $$R = \frac{\bar m_\text{patched} - \bar m_\text{corrupted}}{\bar m_\text{clean} - \bar m_\text{corrupted}},
# \qquad \bar m = \text{mean over the pairs.}$$
#
# A ratio of means, not a mean of ratios: in a pair whose two runs hardly differ, its own ratio is noise divided by almost nothing.
#
# ### Exercise 10.1: a normalised metric
#
# Write `recovery(patched, clean, corrupted)`: `patched` is a tensor `[..., N]` of metrics (any leading axes, N pairs), `clean`
# and `corrupted` are `[N]`; the result has shape `[...]`.


# %% tags=["exercise"]
def recovery(patched, clean, corrupted):
    """Where the mean metric lies between the corrupted run (0) and the clean one (1), [...]."""
    # BEGIN SOLUTION: average each over the pairs (the last axis), then rescale
    low, high = corrupted.mean(), clean.mean()
    return (patched.mean(-1) - low) / (high - low)
    # END SOLUTION


# %% tags=["check"]
some_clean, some_corrupted = torch.tensor([4.0, 2.0, 3.1]), torch.tensor([-4.0, -2.0, 3.0])
some_patched = torch.tensor([[4.0, 2.0, 3.1], [-4.0, -2.0, 3.0], [1.0, 0.0, 2.0], [5.0, 5.0, 5.0]])
found = recovery(some_patched, some_clean, some_corrupted)
check(found is not None, "Does the function return the recovery?")
check(tuple(found.shape) == (4,), "Average over the last axis only: [4, 3] becomes [4].")
check(
    abs(found[0]) > 0.5,
    "The clean values should give 1: subtract the corrupted run, not the clean one, and divide by clean less corrupted.",
)
gap = some_clean - some_corrupted
check(
    not torch.allclose(found[2], ((some_patched[2] - some_corrupted) / gap).mean(), rtol=1e-3),
    "This is the mean of the pairs' ratios, and the third pair, whose gap is 0.1, rules it: take the ratio of the means.",
)
low, high = -1.0, 9.1 / 3  # the two means
check_close(
    found,
    torch.tensor([1.0, 0.0, (1.0 - low) / (high - low), (5.0 - low) / (high - low)]),
    "Clean is 1, corrupted is 0, and a value may lie beyond either.",
)
check(recovery(torch.zeros(2, 5, 3), some_clean, some_corrupted).shape == (2, 5), "Keep any leading axes.")
passed("10.1")

# %% [markdown]
# ## Patch
#
# Put what a path added in the clean run into the corrupted one (**denoising**: does it suffice?), or the other way round
# (**noising**: is it needed? Heimersheim and Nanda 2024, [arXiv 2404.15255](https://arxiv.org/abs/2404.15255)). The library does
# both for any list of sites.

# %%
denoised = activation_patching(model, clean, corrupted, metric, sites=SITES, progress=False)
display(figures.activation_patching(denoised))
show_source(recovered)
low, high = corrupted_value.mean(), clean_value.mean()
by_hand = (torch.from_numpy(denoised.value[:, 0]).mean(-1) - low) / (high - low)
print(
    f"R by hand and by the library: largest difference {(by_hand - torch.from_numpy(denoised.recovery()[:, 0])).abs().max():.1e}"
)

# %% [markdown]
# Three of fourteen sites matter, and those much. All of the answer passes through the ssm of block 0. Then about half of it is
# added by the ssm of block 2 and about half by the attention of block 5.
#
# ### Exercise 10.2: patch one path
#
# Write `patched(site)`: the metric `[N]` of the corrupted run while the path at `site` adds what it added in the clean run. Use
# `replaced(site, change)` from above; `change` receives the contribution and returns another.


# %% tags=["exercise"]
def patched(site):
    """The metric of the corrupted run with the site's clean contribution, [N]."""
    # BEGIN SOLUTION: run the clean texts and keep the site's contribution; run the corrupted ones with it put in
    kept = []
    with torch.no_grad():
        with replaced(site, kept.append):
            model(clean, use_cache=False)
        with replaced(site, lambda contribution: kept[0]):
            return metric(model(corrupted, use_cache=False).logits)
    # END SOLUTION


# %% tags=["check"]
found = patched("layers.0.ssm")
check(found is not None, "Does the function return the metric?")
check(tuple(found.shape) == (num_pairs,), "One number per pair: metric(logits).")
check(
    not torch.allclose(found, corrupted_value, atol=1e-3),
    "This is the corrupted run as it is: does `change` return the kept contribution?",
)
check(
    not torch.allclose(found, clean_value, atol=1e-4),
    "This is the clean run as it is: run the model on the corrupted texts, with one path's clean contribution.",
)
for site in ("layers.0.ssm", "layers.2.ssm", "layers.5.attention"):
    expected = torch.from_numpy(denoised.value[SITES.index(site), 0])
    check_close(
        patched(site),
        expected,
        f"Clean contribution into the corrupted run, at {site}.",
        rtol=1e-3,
        atol=1e-3,
    )
passed("10.2")

# %% [markdown]
# ## What the ablation does not see
#
# Two paths write the answer, half each. What happens if we cut one of them in the clean run?

# %% tags=["predict"]
cut_half = predict(
    "The attention of block 5 is cut. What share of the questions is then answered right (the whole model: all of them)?",
    ["at least 90%", "about half", "at most 10%"],
)


# %%
@torch.no_grad()
def answered(*changes):
    """Loss of the right answer (nats), logit difference, and share right, of the clean texts with these changes."""
    with intervened(model, *changes):
        final = model(clean).logits
    log_probability = final[:, -1].log_softmax(-1)
    answer_loss = -log_probability.gather(1, right[:, None]).mean().item()
    return answer_loss, metric(final).mean().item(), (final[:, -1].argmax(-1) == right).float().mean().item()


ATTENTION, SSM = "attention[5].cut()", "ssm[2].cut()"
for name, cuts in {
    "nothing": (),
    "attention 5": (ATTENTION,),
    "ssm 2": (SSM,),
    "both": (ATTENTION, SSM),
}.items():
    answer_loss, difference, right_share = answered(*cuts)
    print(
        f"cut: {name:12s} loss {answer_loss:6.3f}   logit difference {difference:+6.1f}   right {right_share:.0%}"
    )
one, two = answered(ATTENTION), answered(ATTENTION, SSM)
cut_half.reveal(
    cut_half.options[0 if one[2] >= 0.9 else 2 if one[2] <= 0.1 else 1],
    f"{one[2]:.0%} are right without it, at a loss of {one[0]:.2f} nats, and {two[2]:.0%} without both. Each half of the evidence is enough.",
)

# %% [markdown]
# By its ablation the attention is idle; by patching it writes half of the answer. Both are true: the answer is written *twice*. Such
# backups have been found in transformers too, some of which only wake when the first is gone (Wang et al. 2022,
# [arXiv 2211.00593](https://arxiv.org/abs/2211.00593); McGrath et al. 2023, "The Hydra effect",
# [arXiv 2307.15771](https://arxiv.org/abs/2307.15771)). One cut at a time cannot see them: one must cut sets.
#
# ### Exercise 10.3: what two cuts do beyond their sum
#
# Let $\ell(S)$ be the loss of the right answer with the changes $S$ (the first value of `answered`). Write `interaction(first,
# second)` for two texts of the vocabulary: $\big[\ell(\{a, b\}) - \ell(\emptyset)\big] - \big[\ell(\{a\}) - \ell(\emptyset)\big] - \big[\ell(\{b\}) -
# \ell(\emptyset)\big]$, in nats. Above zero each backs up the other; at zero they do separate things; below zero one has nothing
# left to break once the other is gone.


# %% tags=["exercise"]
def interaction(first, second):
    """Cost of both changes less the sum of their costs, nats."""
    # BEGIN SOLUTION: four losses: none, first, second, both
    none, one, other, both = (answered(*changes)[0] for changes in ((), (first,), (second,), (first, second)))
    return (both - none) - (one - none) - (other - none)
    # END SOLUTION


# %% tags=["check"]
found = interaction(ATTENTION, SSM)
check(found is not None, "Does the function return a number?")
check(
    found > 0, "Both cuts cost more than the sum of single ones, so this should be positive: check the signs."
)
none, one, other, both = (answered(*cuts)[0] for cuts in ((), (ATTENTION,), (SSM,), (ATTENTION, SSM)))
check(abs(found - (both - none)) > 1e-4, "This is the cost of both cuts: take off what each costs alone.")
check_close(found, both - one - other + none, "The loss, the first value of `answered`, in nats.", rtol=1e-3)
known, measured = {"": 1.0, "a": 3.0, "b": 4.0, "ab": 10.0}, answered
answered = lambda *changes: (known["".join(sorted(changes))], 0.0, 0.0)  # noqa: E731 (a stand-in with known losses)
try:
    found = interaction("a", "b")
finally:
    answered = measured
check_close(
    found,
    4.0,
    "Tried on losses 1 (no change), 3 and 4 (one change), 10 (both). Is the whole model's loss taken off every cost?",
)
passed("10.3")

# %% [markdown]
# ## Which path hears which
#
# That a site matters does not say to whom. **Path patching** changes one edge: the receiver reads the residual stream as if the sender
# had said what it said in the clean run, and nobody else does (Wang et al. 2022; Goldowsky-Dill et al. 2023,
# [arXiv 2304.05969](https://arxiv.org/abs/2304.05969)).

# %%
CIRCUIT = ["layers.0.ssm", "layers.2.ssm", "layers.5.attention"]
edges = path_patching(
    model, clean, corrupted, metric, ["embedding", *CIRCUIT], [*CIRCUIT, "logits"], progress=False
)
display(figures.path_patching(edges))

# %% [markdown]
# The whole circuit can be read off: the tokens enter the ssm of block 0; it is heard by the ssm of block 2 *and* by the attention of
# block 5; these two do not hear each other and write to the logits directly. Recall here is not "done by the ssm" or "by
# attention", but by two copies over one first step. That is a claim about texts of six names, so ask texts that were not used
# to find it:

# %%
for num_names in (3, 14):
    *pair, first, second = make_pairs(num_pairs, num_names)
    result = activation_patching(model, *pair, logit_difference(first, second), sites=CIRCUIT, progress=False)
    shares = ", ".join(f"{site.removeprefix('layers.')} {share:.0%}" for site, share in zip(CIRCUIT, result.recovery()[:, 0], strict=True))  # fmt: skip
    print(f"{num_names:2d} names, {pair[0].shape[1]:3d} tokens: {shares}")

# %% [markdown]
# ## Gradients: all sites at the price of one
#
# Exact patching takes a forward pass for each site. Let $c$ be the corrupted contribution, $\Delta = c_\text{clean} - c$, and
# $m(\alpha)$ the metric with $c + \alpha\Delta$ put in. **Attribution patching** takes the tangent at 0,
#
# $$m(1) - m(0) \;=\; \int_0^1 \big\langle \nabla_c m(\alpha), \Delta \big\rangle \, d\alpha \;\approx\; \big\langle \nabla_c m(0), \Delta \big\rangle ,$$
#
# two forward passes and one backward pass for all sites (Syed et al. 2023, [arXiv 2310.10348](https://arxiv.org/abs/2310.10348)). The
# integral itself is exact, and a few values of $\alpha$ with Simpson's rule come close to it (integrated gradients, Sundararajan et al. 2017,
# [arXiv 1703.01365](https://arxiv.org/abs/1703.01365)). Here is $m(\alpha)$ with its tangents.

# %%
with torch.no_grad():
    places = [Site.find(model, site) for site in SITES]
    kept_clean, _ = run_and_keep(model, places, clean, None)
    kept_corrupted, _ = run_and_keep(model, places, corrupted, None)


def value_and_slope(site, alpha):
    """The mean metric with the site's contribution a fraction alpha of the way to the clean one, and its derivative."""
    step = kept_clean[site] - kept_corrupted[site]
    contribution = (kept_corrupted[site] + alpha * step).requires_grad_()
    with replaced(site, lambda _: contribution):
        value = metric(model(corrupted, use_cache=False).logits).mean()
    (gradient,) = torch.autograd.grad(value, contribution)
    return value.item(), (gradient * step).sum().item()


ALPHAS = [0.0, 0.25, 0.5, 0.75, 1.0]
SIMPSON = [1 / 12, 4 / 12, 2 / 12, 4 / 12, 1 / 12]
figure = go.Figure()
for index, site in enumerate(CIRCUIT):
    line, dash = colours(3)[index], ("solid", "dash", "dot")[index]
    points = [value_and_slope(site, alpha) for alpha in ALPHAS]
    (start, slope), end = points[0], points[-1][0]
    integrated = sum(weight * each for weight, (_, each) in zip(SIMPSON, points, strict=True))
    name = site.removeprefix("layers.").replace(".", " ")
    figure.add_trace(go.Scatter(x=ALPHAS, y=[value for value, _ in points], mode="lines+markers", name=name,
                                line={"color": line, "dash": dash}, marker={"symbol": ("circle", "square", "diamond")[index], "size": 8}))  # fmt: skip
    figure.add_trace(go.Scatter(x=[0, 1], y=[start, start + slope], mode="lines", showlegend=False, hoverinfo="skip",
                                line={"color": line, "width": 1.2, "dash": dash}))  # fmt: skip
    print(f"{site:20s} tangent at 0 {slope:+6.1f}   integral from five points {integrated:+6.1f}   exact {end - start:+6.1f}")  # fmt: skip
figure.update_xaxes(title_text="alpha: share of the way from the corrupted to the clean contribution")
figure.update_yaxes(title_text="logit difference")
finish(
    figure, title="Where the way is curved, the tangent at 0 misses the end", theme="light", height=400,
    subtitle="one site's contribution moved from the corrupted to the clean run's; thin lines: tangents at 0 (two nearly coincide)<br>"
    f"mean over n = {num_pairs} pairs of texts",
)  # fmt: skip
display(figure)

# %% [markdown]
# The way from the corrupted to the clean value of block 0's ssm is an S: at its ends the model is sure of one of the answers, and a small step
# changes little. The tangent is the slope of that flat end. It points to the right sites, and underrates the first of them most.
#
# ### Exercise 10.4: attribution patching
#
# Write `attribution_patching(sites)`: the first-order estimate of $m(1) - m(0)$ for every site and pair, a tensor `[Z, N]`, from *two
# forward passes and one backward pass*. `run_and_keep(model, places, ids, None)` returns the contributions by name, and the
# logits; outside of `torch.no_grad()` both belong to one graph, and `torch.autograd.grad(number, list_of_tensors)` goes backward.


# %% tags=["exercise"]
def attribution_patching(sites):
    """Gradient at the corrupted run times (clean less corrupted contribution), [Z, N]."""
    # BEGIN SOLUTION: keep the clean contributions; run the corrupted texts with a graph; one gradient for all sites
    places = [Site.find(model, site) for site in sites]
    with torch.no_grad():
        of_clean, _ = run_and_keep(model, places, clean, None)
    of_corrupted, logits = run_and_keep(model, places, corrupted, None)
    gradients = torch.autograd.grad(metric(logits).sum(), [of_corrupted[site] for site in sites])
    return torch.stack(
        [
            ((of_clean[site] - of_corrupted[site].detach()) * gradient).sum((1, 2))
            for site, gradient in zip(sites, gradients, strict=True)
        ]
    )
    # END SOLUTION


# %% tags=["check"]
passes = []
counter = model.register_forward_pre_hook(lambda *_: passes.append(1))
try:
    found = attribution_patching(SITES)
finally:
    counter.remove()
check(found is not None, "Does the function return the estimates?")
check(
    tuple(found.shape) == (len(SITES), num_pairs),
    f"The shape should be {[len(SITES), num_pairs]}: sum over positions and channels, keep the pairs.",
)
check(len(passes) <= 2, f"{len(passes)} forward passes: two suffice for all sites together.")
expected = torch.tensor([value_and_slope(site, 0.0)[1] for site in CIRCUIT])
mean_found = torch.stack([found[SITES.index(site)].mean() for site in CIRCUIT])
check(not torch.allclose(mean_found, -expected, rtol=1e-2), "The sign is turned round: clean less corrupted.")
check(
    not torch.allclose(mean_found * num_pairs, expected, rtol=1e-2),
    "Too small by the number of pairs: go backward from the *sum* of the metric, since each pair has a gradient of its own.",
)
check_close(
    mean_found,
    expected,
    "Gradient of the *corrupted* run times (clean less corrupted), summed over positions and channels.",
    rtol=1e-2,
    atol=1e-2,
)
exact = torch.from_numpy(denoised.recovery()[:, 0])
estimate = found.mean(-1) / (clean_value.mean() - corrupted_value.mean())
for site, e, a in zip(SITES, exact, estimate, strict=True):
    print(f"{site:20s} exact {e:7.1%}   first order {a:7.1%}")
passed("10.4")

# %% [markdown]
# ## Where this breaks
#
# - **One cut at a time is blind to backups.** The induction probe (`probes/induction`), which cuts paths and counts the loss, calls the attention
#   idle in recall; the patches above give it half of the answer. The loss hides it, because the other half suffices: the table
#   of cuts shows more than a third of the logit difference gone, for a tenth of a nat. Cut sets, and look at a metric that does not saturate.
# - **Ablations depend on the replacement.** Zero and mean do not even agree in sign everywhere in the figure; a cost below zero does not say that
#   a path is harmful, only that this value served these texts better.
# - **"Off" is an ablation too.** The paper's prototype reports two-step accuracy of 0.76 with its workspace on and 0.03 with it off. A model
#   that was trained with a part and runs without it is off its distribution: that gap alone does not say what the part computed. (The
#   task's answer was moreover a function of the number of steps.)
# - **A forced decision is an unusual input**, and forcing an expert with weight one also removes the others.
# - **Patching is relative to its pair.** What both texts share (that a value is asked, that it is a letter) is in no figure
#   above. The edges' shares need not add up, since norms and gates downstream are not linear.
# - **The first-order estimate is cheap and local**: here it finds the three sites, and gets their sizes and their order wrong. Use
#   it to choose sites, and patch those exactly.

# %% [markdown]
# ## Next
#
# - Lesson 11 uses ablation to test whether an expert specializes, against its nulls.
# - Lesson 14 has models of known truth on which a naive reading of such figures is wrong.
# - `hydra_lab.attribution` holds what was used here; `hydra-lab generate --intervene TEXT` runs a change from the command line.
