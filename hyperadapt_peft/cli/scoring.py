"""Metrics, and the Trainers: batches that a resumed run finds again, and evaluation beyond a forward pass with labels."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler


IGNORED = -100  # the label that the loss leaves out
Metrics = Mapping[str, Callable[[Any, Any], Any]]  # name -> a function of the labels and the predictions


def predict(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """The most likely class, the value of a regression, or the most likely token at each position.

    The virtual tokens of prompt methods come first and are cut.
    """
    scores = logits[0] if isinstance(logits, tuple) else logits
    if labels.is_floating_point():
        return scores.squeeze(-1)
    classes = scores.argmax(-1)
    return classes if labels.ndim == 1 else classes[:, -labels.shape[1] :]


def classification(classes: int) -> Metrics:
    """Accuracy, F1 (of the second class of two, else the mean over classes) and Matthews' correlation."""
    f1 = partial(f1_score, average="binary" if classes == 2 else "macro", zero_division=0)
    metrics = {"accuracy": accuracy_score, "f1": f1, "matthews_correlation": matthews_corrcoef}
    return metrics | {"majority": lambda labels, _: np.bincount(labels).max() / len(labels)}


def _correlation(function: Callable[[Any, Any], Any], labels: Any, predictions: Any) -> float:
    return np.nan_to_num(function(predictions, labels).statistic)  # 0 for a constant


REGRESSION: Metrics = {
    "pearson": partial(_correlation, stats.pearsonr),
    "spearman": partial(_correlation, stats.spearmanr),
}


def token_accuracy(labels: Any, predictions: Any) -> float:
    """Accuracy over the completions' tokens, each predicted from the right ones before it."""
    counted = labels[:, 1:] != IGNORED
    return (predictions[:, :-1] == labels[:, 1:])[counted].mean()


def mean(labels: Any, predictions: Any) -> float:
    """The share of right answers, where the evaluation step has judged them."""
    return np.mean(predictions)


class _EpochSampler(LengthGroupedSampler):
    """Draws its order from the seed and the epoch: a run resumed within an epoch could not find the global state."""

    seed: int

    def set_epoch(self, epoch: int) -> None:
        self.generator = torch.Generator().manual_seed(self.seed + epoch)


class RecipeTrainer(Trainer):
    """A Trainer whose batches grouped by length are, after resuming, those of the uninterrupted run.

    Parameters for whose names `is_head` holds learn at `head_learning_rate`.
    """

    is_head: Callable[[str], bool]

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        created, rate = self.optimizer is not None, self.args.head_learning_rate  # type: ignore[attr-defined]
        optimizer = super().create_optimizer(*args)
        if created or rate is None:
            return optimizer
        model: Any = args[0] if args else self.model
        head = {parameter for name, parameter in model.named_parameters() if self.is_head(name)}
        for group in list(optimizer.param_groups):
            of_head = [parameter for parameter in group["params"] if parameter in head]
            group["params"] = [parameter for parameter in group["params"] if parameter not in head]
            optimizer.add_param_group({**group, "params": of_head, "lr": rate})
        return optimizer

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if isinstance(sampler, LengthGroupedSampler):
            sampler = _EpochSampler(sampler.batch_size, lengths=sampler.lengths)
            sampler.seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            sampler.set_epoch(0)  # accelerate does not find it when there are several processes, and they must agree
        return sampler


# Evaluates by a forward pass, of which only the predictions are kept: logits of a vocabulary would fill the memory.
ArgmaxTrainer = partial(RecipeTrainer, preprocess_logits_for_metrics=predict)


class GenerationTrainer(RecipeTrainer):
    """Evaluates by what the model generates, greedily, for the prompt of each row."""

    def __init__(self, max_new_tokens: int, answer: Callable[[str], str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.max_new_tokens, self.answer = max_new_tokens, answer

    def prediction_step(self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None):  # type: ignore[override]
        """The loss, and for each row whether the generated answer is the completion's."""
        loss, _, _ = super().prediction_step(model, inputs, True, ignore_keys)
        assert loss is not None, "the rows have labels"
        tokenizer: PreTrainedTokenizerBase = self.processing_class  # type: ignore[assignment]
        inputs = self._prepare_inputs(inputs)
        known = inputs["labels"] == IGNORED
        prompts = [
            row[keep] for row, keep in zip(inputs["input_ids"], known & inputs["attention_mask"].bool(), strict=True)
        ]
        padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(loss.device)
        with self.compute_loss_context_manager():
            tokens = self.accelerator.unwrap_model(model).generate(
                **padded,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        generated = tokenizer.batch_decode(tokens[:, padded["input_ids"].shape[1] :], skip_special_tokens=True)
        completions = [row[~ignored] for row, ignored in zip(inputs["labels"], known, strict=True)]
        expected = tokenizer.batch_decode(completions, skip_special_tokens=True)
        right = [self.answer(one) == self.answer(other) for one, other in zip(generated, expected, strict=True)]
        result = torch.tensor(right, dtype=torch.float32, device=loss.device)
        return loss, result, result


class ChoiceTrainer(RecipeTrainer):
    """Evaluates by which completion is the most likely, per token.

    A batch holds the right completions first and then the others; `example` tells which of the right ones each competes
    with.
    """

    def prediction_step(self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None):  # type: ignore[override]
        """The right completions' loss, and for each whether it is likelier than every other."""
        inputs = self._prepare_inputs(inputs)
        labels, example = inputs.pop("labels"), inputs.pop("example")
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**inputs).logits[:, -labels.shape[1] :]
        targets = labels[:, 1:]
        losses = F.cross_entropy(
            logits[:, :-1].transpose(1, 2).float(), targets, ignore_index=IGNORED, reduction="none"
        )
        per_token = losses.sum(1) / (targets != IGNORED).sum(1)
        right, others = per_token.split([len(per_token) - len(example), len(example)])
        best_other = torch.full_like(right, torch.inf).scatter_reduce(0, example, others, "amin")
        result = (right < best_other).float()
        return right.mean(), result, result
