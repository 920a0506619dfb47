"""The cells of one seed: what is trained, rounded and measured, in order. A cell is the unit that a killed run repeats.

Names of cells:
- `base/<rule>`: the base model, whose experts were rounded by this rule.
- `sft/<variant>`: a fine-tuned model. A variant is `<rule>/<method>/<size of change>`.
- `ptq/<variant>/<format>/<rounding>`: its experts are rounded. `drop` gives the experts of the base back.
- `more/<method>/<size>/<fraction>/<rounding>`: SFT goes on for the extra steps, at a fraction of its rate, and the
  experts are rounded. `none` does not round.
- `qat/<method>/<size>/<format>/<start>/<fraction>[/distilled]`: QAT for the extra steps.
- `bf16/<size>/<factor>` and `fast/<factor>`: the BF16 parts, and all weights, trained at a multiple of SFT's rate.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.models import fake_quantizers
from pipeline.training.distillation import Teacher
from scripts.rounding_study import models, rounding
from scripts.rounding_study.measures import Predictions, predict
from scripts.rounding_study.models import Weights
from scripts.rounding_study.rounding import BASE, GPTQ, NEAREST, STOCHASTIC, Base, Rounding, block_format
from scripts.rounding_study.settings import BF16_PARTS, FULL, LORA, SIZES, Settings
from scripts.rounding_study.task import Habits, Rows, expect_tokens, make_rows
from scripts.rounding_study.training import train

Figures = dict[str, float | None]
Cell = tuple[str, Callable[[], Figures]]
"""Name of a cell, and the function that computes its figures."""

DROP = "drop"
ROUNDINGS = {
    "mxfp4": (
        *((NEAREST, rule) for rule in ("ceil", "floor", "mse", BASE)),
        (STOCHASTIC, BASE),
        (GPTQ, "ceil"),
        (GPTQ, BASE),
    ),
    "nvfp4": ((NEAREST, "mse"), (STOCHASTIC, BASE), (GPTQ, "mse")),
}
"""Format -> the ways of rounding that are compared."""

STARTS = {NEAREST: "ceil", STOCHASTIC: BASE, GPTQ: "ceil"}
"""Rounding that QAT starts from, and that follows the controls -> its rule for the scales."""

LARGE = SIZES[:2]
"""Sizes of change for which QAT runs. A change of 0.1 % leaves it nothing to do."""

_BASE_RULES = ("ceil", "floor")
_FACTORS = (1, 3)
_PRETRAINING_ROWS = 50_000
_SEEDS = 1000  # seeds of random numbers that belong to one seed of the study


@dataclass
class Seed:
    """One seed of the study.

    Attributes:
        number: the seed.
        settings: settings of the study.
        directory: where models are kept, so that a killed run goes on.
    """

    number: int
    settings: Settings
    directory: Path
    _predictions: dict[str, Predictions] = field(default_factory=dict)

    def cells(self) -> Iterator[Cell]:
        """Yield all cells in order. Each cell makes the models that it needs, unless they are stored."""
        for rule in _BASE_RULES:
            yield f"base/{rule}", partial(self._measure_base, rule)
            for method in (FULL, LORA) if rule == "ceil" else (FULL,):
                for size in SIZES:
                    variant = f"{rule}/{method}/{size}"
                    yield f"sft/{variant}", partial(self._measure_sft, variant)
                    yield from self._roundings(variant)
        yield from self._parts()
        for method in (FULL, LORA):
            for size in LARGE:
                yield from self._continued(method, size)

    def _roundings(self, variant: str) -> Iterator[Cell]:
        yield f"ptq/{variant}/mxfp4/{DROP}", partial(self._measure_dropped, variant)
        for form, ways in ROUNDINGS.items():
            for method, rule in ways:
                how = Rounding(block_format(form), method, rule, self.number)
                yield f"ptq/{variant}/{form}/{method} {rule}", partial(self._measure_rounded, variant, how, None)

    def _parts(self) -> Iterator[Cell]:
        for size in SIZES:
            for factor in _FACTORS if size == SIZES[0] else (1,):
                yield f"bf16/{size}/{factor}", partial(self._measure_tuned, BF16_PARTS, size, factor)
        for factor in _FACTORS[1:]:
            yield f"fast/{factor}", partial(self._measure_tuned, FULL, SIZES[0], factor)

    def _continued(self, method: str, size: str) -> Iterator[Cell]:
        variant = f"ceil/{method}/{size}"
        for fraction, factor in self.settings.fractions.items():
            more = f"more/{method}/{size}/{fraction}"
            trained = partial(self._more, method, size, fraction)
            yield f"{more}/none", partial(self._measure_more, variant, trained)
            for start, rule in STARTS.items():
                if start == NEAREST or factor == 1:
                    how = Rounding(block_format("mxfp4"), start, rule, self.number)
                    yield f"{more}/{start}", partial(self._measure_rounded, variant, how, trained)
        default = self.settings.default_fraction
        runs = [(method, "mxfp4", NEAREST, fraction, False) for fraction in self.settings.fractions]
        runs += [(method, "mxfp4", start, default, False) for start in (STOCHASTIC, GPTQ)]
        runs += [(method, "mxfp4", NEAREST, default, True), (method, "nvfp4", NEAREST, default, False)]
        if method == FULL and size == SIZES[0]:
            runs += [(BF16_PARTS, "mxfp4", start, default, False) for start in STARTS]
        for trained, form, start, fraction, distils in runs:
            name = f"qat/{trained}/{size}/{form}/{start}/{fraction}" + "/distilled" * distils
            work = partial(self._measure_qat, trained, form, start, self.settings.fractions[fraction], distils)
            yield name, partial(work, variant)

    @cached_property
    def _base_rows(self) -> Rows:
        return make_rows(_PRETRAINING_ROWS, Habits.of(self.number, is_tuned=False), self._seed(0))

    @cached_property
    def _base_validation(self) -> Rows:
        habits = Habits.of(self.number, is_tuned=False)
        return make_rows(self.settings.validation_rows, habits, self._seed(1))

    @cached_property
    def _sft_rows(self) -> Rows:
        return make_rows(self.settings.sft_rows, Habits.of(self.number, is_tuned=True), self._seed(2))

    @cached_property
    def _validation(self) -> Rows:
        return make_rows(self.settings.validation_rows, Habits.of(self.number, is_tuned=True), self._seed(3))

    @cached_property
    def _chances(self) -> Tensor:
        return expect_tokens(self._validation, Habits.of(self.number, is_tuned=True))

    @cached_property
    def _calibration(self) -> Rows:
        return Rows(self._sft_rows.ids[: self.settings.calibration_rows])

    def _seed(self, purpose: int) -> int:
        return _SEEDS * (self.number + 1) + purpose

    def _stored(self, name: str, make: Callable[[], Weights]) -> Weights:
        path = self.directory / f"{name.replace('/', '_').replace(' %', '')}.safetensors"
        if not path.is_file():
            self.directory.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".unfinished")
            save_file({key: each.contiguous() for key, each in make().items()}, unfinished)
            unfinished.replace(path)
        return load_file(path)

    def _pretrained(self) -> Weights:
        def make() -> Weights:
            settings = self.settings
            torch.manual_seed(self._seed(4))
            model = models.make(settings)
            train(
                model,
                self._base_rows,
                steps=settings.pretraining_steps,
                rate=settings.pretraining_rate,
                batch=settings.pretraining_batch,
                seed=self._seed(5),
                balances_experts=True,
            )
            return models.read(model)

        return self._stored("pretrained", make)

    def _base(self, rule: str) -> Base:
        """Return the base. The model learns to live with the grid before its experts are rounded."""

        def make() -> Weights:
            settings, form = self.settings, block_format("mxfp4").with_rule(rule)
            model = models.load(settings, self._pretrained())
            models.prepare(model, settings, FULL, seed=self._seed(6), block_format=form)
            train(
                model,
                self._base_rows,
                steps=settings.grid_steps,
                rate=settings.grid_rate,
                batch=settings.pretraining_batch,
                seed=self._seed(7),
            )
            return models.read(model)

        return Base.of(self._stored(f"base/{rule}", make), rule)

    def _tuned(self, rule: str, method: str, rate: float, name: str) -> Weights:
        """Return a fine-tuned model. For LoRA, this has the merged weights and the factors."""

        def make() -> Weights:
            model = models.load(self.settings, self._base(rule).weights)
            model = models.prepare(model, self.settings, method, seed=self._seed(8))
            self._train(model, self.settings.sft_steps, rate, self._seed(9))
            return self._with_factors(model)

        return self._stored(name, make)

    def _train(
        self, model: models.PreTrainedModel, steps: int, rate: float, seed: int, teacher: Teacher | None = None
    ) -> None:
        train(model, self._sft_rows, steps=steps, rate=rate, batch=self.settings.batch, seed=seed, teacher=teacher)

    def _with_factors(self, model: models.PreTrainedModel) -> Weights:
        factors = models.read_factors(model)
        return {**models.read_merged(model), **factors}

    def _sft(self, variant: str) -> Weights:
        rule, method, size = variant.split("/")
        return self._tuned(rule, method, self.settings.rates[method][size], f"sft/{variant}")

    def _more(self, method: str, size: str, fraction: str) -> Weights:
        """Return the model that SFT trains for the extra steps, with a new schedule."""

        def make() -> Weights:
            before = self._sft(f"ceil/{method}/{size}")
            model = self._continue(method, before)
            model = models.prepare(model, self.settings, method, seed=0, factors=_factors(before))
            rate = self.settings.fractions[fraction] * self.settings.rates[method][size]
            self._train(model, self.settings.extra_steps, rate, self._seed(10))
            return self._with_factors(model)

        return self._stored(f"more/{method}/{size}/{fraction}", make)

    def _continue(self, method: str, tuned: Weights) -> models.PreTrainedModel:
        """Make the model that a second stage trains: the tuned model, or the base below its adapters."""
        return models.load(self.settings, self._base("ceil").weights if method == LORA else _plain(tuned))

    def _predict(self, weights: Weights) -> Predictions:
        return self._judge(models.load(self.settings, _plain(weights)))

    def _judge(self, model: models.PreTrainedModel) -> Predictions:
        return predict(model, self._validation, self._chances)

    def _reference(self, variant: str) -> Predictions:
        if variant not in self._predictions:
            self._predictions = {variant: self._predict(self._sft(variant))}
        return self._predictions[variant]

    def _measure_base(self, rule: str) -> Figures:
        weights = self._base(rule).weights
        before = predict(models.load(self.settings, self._pretrained()), self._base_validation)
        model = models.load(self.settings, weights)
        return {
            "pretrained_loss": before.loss,
            "base_loss": predict(model, self._base_validation).loss,
            "loss": self._judge(model).loss,
            "entropy": self._judge(model).entropy,
        }

    def _measure_sft(self, variant: str) -> Figures:
        base = self._base(variant.split("/")[0])
        return {"loss": self._reference(variant).loss, "relative_change": _change(self._sft(variant), base)}

    def _measure_tuned(self, method: str, size: str, factor: int) -> Figures:
        rate = factor * self.settings.rates[FULL][size]
        tuned = self._tuned("ceil", method, rate, f"tuned/{method}/{size}/{factor}")
        return {"loss": self._predict(tuned).loss, "relative_change": _change(tuned, self._base("ceil"))}

    def _measure_dropped(self, variant: str) -> Figures:
        weights = rounding.drop_change(_plain(self._sft(variant)), self._base(variant.split("/")[0]))
        return self._compare(self._predict(weights), variant)

    def _measure_rounded(self, variant: str, how: Rounding, trained: Callable[[], Weights] | None) -> Figures:
        tuned = self._sft(variant) if trained is None else trained()
        rounded, account = self._round(tuned, variant, how)
        return {**self._compare(self._predict(rounded), variant), **account}

    def _round(self, tuned: Weights, variant: str, how: Rounding) -> tuple[Weights, Figures]:
        base = self._base(variant.split("/")[0])
        return rounding.round_experts(_plain(tuned), base, how, self.settings, self._calibration)

    def _measure_more(self, variant: str, trained: Callable[[], Weights]) -> Figures:
        more = trained()
        figures = self._compare(self._predict(more), variant)
        return {**figures, "relative_change": _change(more, self._base("ceil"))}

    def _measure_qat(self, method: str, form: str, start: str, fraction: float, distils: bool, variant: str) -> Figures:
        """Train as stage=qat does. After `nearest`, it goes on with SFT's weights. Otherwise, with rounded experts."""
        _, tuned_by, size = variant.split("/")
        tuned, chosen = self._sft(variant), block_format(form)
        factors = None
        if start == NEAREST and method != BF16_PARTS:
            model, factors = self._continue(method, tuned), _factors(tuned)
        else:
            rounded, _ = self._round(tuned, variant, Rounding(chosen, start, STARTS[start], self.number))
            model = models.load(self.settings, _plain(rounded))
        model = models.prepare(
            model, self.settings, method, seed=self._seed(11), block_format=chosen, factors=factors or None
        )
        teacher = None
        if distils:
            teacher = Teacher(models.load(self.settings, _plain(tuned)).eval(), self.settings.distillation, 1.0)
        rate = fraction * self.settings.rates[tuned_by][size]
        self._train(model, self.settings.extra_steps, rate, self._seed(10), teacher)
        fake_quantizers.count(model, chosen)
        return self._compare(self._judge(model), variant)

    def _compare(self, found: Predictions, variant: str) -> Figures:
        return {"loss": found.loss, "kl": found.divergence_from(self._reference(variant))}


def _plain(weights: Weights) -> Weights:
    return {name: each for name, each in weights.items() if "lora_" not in name}


def _factors(weights: Weights) -> Weights:
    return {name: each for name, each in weights.items() if "lora_" in name}


def _change(tuned: Weights, base: Base) -> float:
    """Return |change of the experts| / |experts of the base|."""
    names = models.stacks(base.weights)
    change = sum(float((tuned[name] - base.weights[name]).double().square().sum()) for name in names)
    return (change / sum(float(base.weights[name].double().square().sum()) for name in names)) ** 0.5
