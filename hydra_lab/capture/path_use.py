"""Measure path use: what each path adds to its block's update, and what the model loses without it.

Shape suffixes: B rows, L positions, N samples, Z domains, P paths.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hydra_lab.capture.record import record
from hydra_lab.data.document import Document
from hydra_lab.data.samples import Samples, samples_from_texts
from hydra_lab.locks import model_lock
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.path_use import PathUse
from hydra_lab.taps import PATHS


def measure_path_use(
    model: HydraForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    texts_by_domain: Mapping[str, Iterable[str | Document]],
    *,
    num_tokens: int = 256,
    num_samples: int | None = None,
    batch_size: int = 8,
    progress: Callable[[str], None] | None = None,
) -> PathUse:
    """Share, cosine and cost of cutting for every path of `model`, on texts that it was not trained on.

    Runs the model once as it is and once without each of its paths.

    Args:
        texts_by_domain: domain -> its texts; of a `Document` only the tokens that it marks count in the loss.
        num_tokens: tokens per sample; short texts of a domain are joined, long ones cut.
        num_samples: most samples per domain; None takes all.
        batch_size: samples per forward pass; it does not change the result.
        progress: receives a line before each pass over the samples.
    """
    samples = samples_from_texts(texts_by_domain, tokenizer, num_tokens=num_tokens, num_samples=num_samples)
    return path_use_of_samples(model, samples, batch_size=batch_size, progress=progress)


def path_use_of_samples(
    model: HydraForCausalLM,
    samples: Samples,
    *,
    batch_size: int = 8,
    progress: Callable[[str], None] | None = None,
) -> PathUse:
    """`measure_path_use` on rows of tokens that are already there.

    Raises:
        ValueError: a domain has no token that the loss counts.
    """
    paths = tuple(path for path in PATHS if model.config.layers_with(path))
    say = progress or (lambda _line: None)
    say("path use: the model as it is")
    share, cosine = _shares(model, samples, paths, batch_size)
    uncut_N = sample_losses(model, samples, batch_size=batch_size)

    domains = tuple(dict.fromkeys(samples.domains))
    member_ZN = np.array([[label == domain for label in samples.domains] for domain in domains])
    scored_N = scored_tokens(samples)
    tokens_Z = member_ZN @ scored_N
    if (tokens_Z == 0).any():
        empty = ", ".join(domain for domain, count in zip(domains, tokens_Z, strict=True) if count == 0)
        raise ValueError(f"no token of {empty} is scored, so cutting a path has no cost there")
    increase, error = np.zeros((2, len(paths), len(domains)))
    for p, path in enumerate(paths):
        say(f"path use: without {path}")
        with model_lock(model), model.cut(path):
            cut_N = sample_losses(model, samples, batch_size=batch_size)
        for z, member_N in enumerate(member_ZN):
            weight = np.where(member_N, scored_N, 0)
            used = weight > 0
            increase[p, z], error[p, z] = weighted_mean((cut_N - uncut_N)[used], weight[used])
    return PathUse(
        layers=tuple(range(model.config.num_hidden_layers)),
        paths=paths,
        share=share,
        cosine=cosine,
        domains=domains,
        loss=np.array(
            [
                np.average(uncut_N[member & (scored_N > 0)], weights=scored_N[member & (scored_N > 0)])
                for member in member_ZN
            ]
        ),
        loss_increase=increase,
        loss_increase_error=error,
        num_samples=(member_ZN & (scored_N > 0)).sum(axis=1),
        num_tokens=tokens_Z,
    )


def scored_tokens(samples: Samples) -> NDArray[np.int64]:
    """[N] tokens of each sample that have a loss: those that count, but for a sample's first, which nothing
    predicts."""
    return samples.scored[:, 1:].sum(axis=1)


def sample_losses(model: HydraForCausalLM, samples: Samples, *, batch_size: int = 8) -> NDArray[np.float64]:
    """[N] mean negative log-likelihood of each sample's scored tokens, nats; NaN for a sample that has none.

    Hooks that are on the model (a cut path, an ablated expert) take part.
    """
    losses = np.full(len(samples), np.nan)
    for rows, input_ids, attention_mask in batches(samples, batch_size):
        with model_lock(model), torch.no_grad():
            logits = model(
                input_ids=input_ids.to(model.device),
                attention_mask=attention_mask.to(model.device),
                use_cache=False,
            ).logits
        nll_BL = F.cross_entropy(
            logits[:, :-1].float().transpose(1, 2), input_ids[:, 1:].to(logits.device), reduction="none"
        )
        nll = nll_BL.double().cpu().numpy()
        scored = samples.scored[rows, 1 : input_ids.shape[1]]
        count = scored.sum(axis=1)
        some = count > 0
        losses[rows[some]] = (nll * scored).sum(axis=1)[some] / count[some]
    return losses


def batches(samples: Samples, batch_size: int) -> Iterator[tuple[NDArray[np.int64], Tensor, Tensor]]:
    """Rows, their token ids [B, L] and attention mask [B, L], `batch_size` rows at a time, cut to the
    longest."""
    for start in range(0, len(samples), batch_size):
        rows = np.arange(start, min(start + batch_size, len(samples)))
        size = int(samples.length[rows].max())
        mask = np.arange(size) < samples.length[rows, None]
        yield rows, torch.from_numpy(samples.tokens[rows, :size]), torch.from_numpy(mask.astype(np.int64))


def weighted_mean(values: NDArray[np.float64], weight: NDArray[np.int64]) -> tuple[float, float]:
    """Mean of `values` [N] weighted by `weight` [N], and its standard error over the N samples (NaN for one).

    The error is that of a ratio of sums, sqrt(N / (N-1) sum w^2 (v - mean)^2) / sum w.
    """
    mean = float(np.average(values, weights=weight))
    if len(values) < 2:
        return mean, float("nan")
    spread = float((weight**2 * (values - mean) ** 2).sum()) * len(values) / (len(values) - 1)
    return mean, float(np.sqrt(spread) / weight.sum())


def _shares(
    model: HydraForCausalLM, samples: Samples, paths: tuple[str, ...], batch_size: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean share and cosine [Y, P] over the samples' tokens; NaN where a block lacks the path."""
    shape = (model.config.num_hidden_layers, len(paths))
    total, count = np.zeros((2, *shape)), np.zeros((2, *shape))
    for rows, input_ids, attention_mask in batches(samples, batch_size):
        recording = record(model, input_ids, attention_mask, taps=[], contributions=True)
        inside = np.arange(input_ids.shape[1]) < samples.length[rows, None]  # a row's own tokens come first
        for name, update in recording.contributions.items():
            _, layer, path = name.split(".")
            cell = (int(layer), paths.index(path))
            for kind, value in enumerate((update.share, update.cosine)):
                values = value.double().cpu().numpy()[inside]
                known = ~np.isnan(values)
                total[kind][cell] += values[known].sum()
                count[kind][cell] += known.sum()
    with np.errstate(invalid="ignore"):
        share, cosine = total / count
    return share, cosine
