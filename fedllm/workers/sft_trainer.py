"""TRL's trainer, whose loss may be any function of a completion's logits and tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from trl import SFTTrainer

from fedllm.core import Loss
from fedllm.workers.dp_sgd import Steps, mean_over_rows


class Trainer(SFTTrainer):
    """``SFTTrainer`` as it is, until ``loss`` is set.

    TRL's own ``compute_loss_func`` runs the model twice, and what dropout draws then depends on the metrics.
    """

    loss: Loss | None = None
    extra: Callable[[], Tensor] | None = None
    drift: Sequence[tuple[nn.Parameter, Tensor]] = ()
    private: Steps | None = None

    def get_train_dataloader(self) -> Any:
        if self.private is None:
            return super().get_train_dataloader()
        return self.private.batches(self.train_dataset, self.args.max_steps, self.data_collator)

    def create_optimizer(self, *args: Any, **options: Any) -> Any:
        if self.optimizer is None:
            made = super().create_optimizer(*args, **options)
            self.optimizer = made if self.private is None else self.private.optimizer(made)
        return self.optimizer

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Every token counts the same, however the rows of an optimizer step fall into forward passes.

        ``extra`` counts once an optimizer step: where the Trainer does not divide by the passes, each has its share.
        """
        value = self._own_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.extra is None:
            return value
        share = 1.0 if num_items_in_batch is None else 1 / self.current_gradient_accumulation_steps
        return (value[0] + share * self.extra(), value[1]) if return_outputs else value + share * self.extra()

    def _own_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool, num_items_in_batch: Any) -> Any:
        if self.private is not None:
            self._total_train_tokens += int(inputs["attention_mask"].sum())
            z = model(**{key: x for key, x in inputs.items() if key != "labels"}, use_cache=False).logits
            return mean_over_rows(z, inputs["labels"])
        if self.loss is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"][:, 1:]
        z = model(**{key: x for key, x in inputs.items() if key != "labels"}, use_cache=False).logits[:, :-1]
        trained = labels != -100
        self._total_train_tokens += int(inputs["attention_mask"].sum())
        value = self.loss(z[trained].float(), labels[trained])
        return value if num_items_in_batch is None else value * (trained.sum() / num_items_in_batch)
