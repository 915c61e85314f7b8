"""Text that the model writes, token by token."""

from collections.abc import Iterator

import torch

from dashboards.shared.sources import LoadedModel
from hydra_lab.decoding import prefill
from hydra_lab.interventions import Intervention, intervened
from hydra_lab.locks import model_lock
from hydra_lab.widgets.text import token_texts


class Writer:
    """Writes a continuation as it is read.

    Attributes:
        ids: the tokens that were written so far.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        prompt: tuple[int, ...],
        changes: tuple[Intervention, ...],
        *,
        num_tokens: int,
        temperature: float,
        seed: int,
    ) -> None:
        """Prepare to write.

        Args:
            prompt: token ids.
            changes: interventions in force at every step.
            num_tokens: at most so many; fewer where the model ends the text.
            temperature: of the sampling; 0 takes the likeliest token.
            seed: of the sampling.
        """
        self.loaded, self.prompt, self.changes = loaded, prompt, changes
        self.num_tokens, self.temperature = num_tokens, temperature
        self.random = torch.Generator().manual_seed(seed)
        self.ids: list[int] = []

    def __iter__(self) -> Iterator[str]:
        """The texts of the tokens. The model is free for others between two of them."""
        model, end = self.loaded.model, self.loaded.tokenizer.eos_token_id
        cache, unread = None, torch.tensor([self.prompt], device=model.device)
        for _ in range(self.num_tokens):
            with model_lock(model), torch.no_grad(), intervened(model, *self.changes):
                if cache is None:
                    out = prefill(model, unread)
                else:
                    out = model(input_ids=unread, past_key_values=cache, use_cache=True, logits_to_keep=1)
            assert out.logits is not None
            cache = out.past_key_values
            token = self._choose(out.logits[0, -1].float().cpu())
            if token == end:
                return
            self.ids.append(token)
            unread = torch.tensor([[token]], device=model.device)
            yield token_texts(self.loaded.tokenizer, [token])[0]

    def _choose(self, logits: torch.Tensor) -> int:
        if self.temperature == 0:
            return int(logits.argmax())
        probability = (logits / self.temperature).softmax(dim=-1)
        return int(torch.multinomial(probability, 1, generator=self.random))
