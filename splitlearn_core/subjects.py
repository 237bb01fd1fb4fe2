"""Those who are asked in a trial: the unsplit model, a chain of parts, parts one at a time."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache

from splitlearn_core.hidden_state import HiddenState
from splitlearn_core.trial import CACHED, GENERATE, GRADIENTS, HIDDEN, LOGITS, PADDED, Answers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import nn
    from transformers import PreTrainedModel

    from splitlearn_core.causal_lm import SplitCausalLM
    from splitlearn_core.families import Family
    from splitlearn_core.plan import ComponentSpec, SplitPlan
    from splitlearn_core.split_model import SplitModel
    from splitlearn_core.trial import Named, Step, Trial

# Stands for a part's input among the names of its parameters: the hidden state, and with a dot and
# their own names the values that go with it.
_INPUT = ""


def parameters_to_differentiate(
    model: PreTrainedModel, family: Family, plan: SplitPlan
) -> dict[str, str]:
    """Choose a parameter of each part: component -> the unsplit model's name for it.

    It is the first of the part's first layer (of its embeddings or its head, where it has no
    layer), so that its gradient goes through all of the part.  One that is tied to another part's
    does not do; a part that has no other is left out.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    untied = [found[0] for found in names.values() if len(found) == 1]
    chosen: dict[str, str] = {}
    for spec in plan.components:
        places = _places(family, spec)
        found = next((name for name in untied if name.startswith(places)), None)
        if found is not None:
            chosen[spec.name] = found
    return chosen


def _places(family: Family, spec: ComponentSpec) -> tuple[str, ...]:
    """Return the prefixes of the names of a part's first layer, or of the end that it is."""
    if spec.num_layers:
        return (f"{family.layers}.{spec.start_layer}.",)
    ends = family.embeddings if spec.is_first else family.epilogue
    return tuple(f"{path}." for path in ends)


class Unsplit:
    """transformers' own model."""

    def __init__(
        self,
        model: PreTrainedModel,
        family: Family,
        plan: SplitPlan,
        parameters: Mapping[str, str],
        differentiable: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Take a model that is loaded.

        Args:
            model: The whole.
            family: Its architecture.
            plan: Where the parts that it is compared with are cut.
            parameters: From `parameters_to_differentiate`.
            differentiable: Entered around a forward that backward follows.
        """
        self.model = model
        self.device = next(p.device for p in model.get_input_embeddings().parameters())
        self._family = family
        self._plan = plan
        self._parameters = parameters
        self._differentiable = differentiable

    def ask(self, trial: Trial, *, generate: bool) -> Answers:
        """Return what the model makes of the trial."""
        answers = Answers()
        hidden: Named = {}
        with self._recording(hidden):
            logits = _series(trial, LOGITS, self._forward, None)
        answers.results |= {LOGITS: logits, HIDDEN: hidden}
        for check in (CACHED, PADDED):
            cache = DynamicCache(config=self.model.config)
            with answers.trying(check):
                answers.results[check] = _series(trial, check, self._forward, cache)
        if generate:
            with answers.trying(GENERATE):
                answers.results[GENERATE] = _generated(trial, self.model, self.device)
        with answers.trying(GRADIENTS):
            answers.results[GRADIENTS] = self._gradients(trial)
        return answers

    def _forward(self, step: Step, cache: Any) -> torch.Tensor:
        cached = (
            {}
            if cache is None
            else {
                self._family.cache_argument: cache,
                "use_cache": True,
            }
        )
        mask = None if step.mask is None else step.mask.to(self.device)
        output = self.model(step.ids.to(self.device), attention_mask=mask, **cached)
        logits: torch.Tensor = output.logits
        return logits

    @contextmanager
    def _recording(self, into: Named) -> Iterator[None]:
        """Note the hidden state where each part ends: what the next layer is given."""
        layers = self.model.get_submodule(self._family.layers)
        where = self._family.hidden_argument

        def note_as(name: str) -> Callable[..., None]:
            def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                value = args[where] if isinstance(where, int) else kwargs[where]
                value = value.movedim(0, 2) if self._family.batch_axis else value
                into[f"after {name}"] = value.detach().cpu()

            return note

        handles = [
            layers.get_submodule(str(spec.end_layer)).register_forward_pre_hook(
                note_as(spec.name), with_kwargs=True
            )
            for spec in self._plan.components
            if spec.end_layer < self._plan.num_layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _gradients(self, trial: Trial) -> Named:
        ids = trial.ids.to(self.device)
        with self._differentiable():
            loss = self.model(ids, labels=ids).loss
            wanted = {n: self.model.get_parameter(n) for n in self._parameters.values()}
            return _differentiate(loss, wanted)


class Chain:
    """Parts that are all in memory, as one model."""

    def __init__(self, model: SplitCausalLM, parameters: Mapping[str, str]) -> None:
        self.model = model
        self._parameters = parameters

    def ask(self, trial: Trial) -> Answers:
        """Return what the chain makes of the trial."""
        answers = Answers()
        hidden: Named = {}
        with self._recording(hidden):
            logits = _series(trial, LOGITS, self._forward, None)
        answers.results |= {LOGITS: logits, HIDDEN: hidden}
        for check in (CACHED, PADDED):
            with answers.trying(check):
                cache = self.model.new_cache()
                answers.results[check] = _series(trial, check, self._forward, cache)
        with answers.trying(GENERATE):
            answers.results[GENERATE] = _generated(trial, self.model, self.model.device)
        with answers.trying(GRADIENTS):
            answers.results[GRADIENTS] = self._gradients(trial)
        return answers

    def _gradients(self, trial: Trial) -> Named:
        loss = self.model(trial.ids, labels=trial.ids).loss
        wanted = {
            name: part.model.get_parameter(name)
            for part in self.model.parts
            if (name := self._parameters.get(part.component)) is not None
        }
        return _differentiate(loss, wanted)

    def _forward(self, step: Step, cache: Any) -> torch.Tensor:
        output = self.model(step.ids, attention_mask=step.mask, past_key_values=cache)
        logits: torch.Tensor = output.logits
        return logits

    @contextmanager
    def _recording(self, into: Named) -> Iterator[None]:
        """Note what leaves each part, where that is not the logits."""

        def note(part: nn.Module, _: Any, output: Any) -> None:
            into[f"after {part.component}"] = HiddenState.of(output).tensor.detach().cpu()

        handles = [
            part.register_forward_hook(note)
            for part in self.model.parts
            if part.end_layer < self.model.parts[-1].end_layer
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class PartByPart:
    """Parts of which one at a time is in memory."""

    def __init__(
        self,
        load: Callable[[ComponentSpec], SplitModel],
        plan: SplitPlan,
        parameters: Mapping[str, str],
    ) -> None:
        """Say how to load a part; each is loaded twice, and let go before the next."""
        self._load = load
        self._plan = plan
        self._parameters = parameters

    def ask(self, trial: Trial) -> Answers:
        """Return what the parts make of the trial."""
        answers = Answers()
        steps = {check: trial.steps(check) for check in (LOGITS, CACHED, PADDED)}
        values: dict[str, list[Any]] = {c: [step.ids for step in s] for c, s in steps.items()}
        inputs: list[Any] = [trial.ids]
        hidden: Named = {}
        for spec in self._plan.components:
            part = self._load(spec)
            values = self._forward(part, steps, values, answers)
            inputs.append(self._pass_on(part, inputs[-1]))
            if spec.end_layer < self._plan.num_layers:
                hidden[f"after {spec.name}"] = HiddenState.of(values[LOGITS][0]).tensor.cpu()
            del part
        for check, outputs in values.items():
            answers.results[check] = {
                step.name: output.logits.cpu()[step.real]
                for step, output in zip(steps[check], outputs, strict=True)
            }
        answers.results[HIDDEN] = hidden
        with answers.trying(GRADIENTS):
            answers.results[GRADIENTS] = self._gradients(inputs, trial.ids)
        return answers

    def _forward(
        self,
        part: SplitModel,
        steps: Mapping[str, Sequence[Step]],
        values: Mapping[str, Sequence[Any]],
        answers: Answers,
    ) -> dict[str, list[Any]]:
        """Run the steps of all checks through one part; a check that fails is not gone on with."""
        outputs: dict[str, list[Any]] = {}
        for check, given in values.items():
            if check == LOGITS:
                outputs[check] = _through(part, steps[check], given, None)
                continue
            with answers.trying(check):
                outputs[check] = _through(part, steps[check], given, part.new_cache())
        return outputs

    def _pass_on(self, part: SplitModel, given: Any) -> Any:
        """Return what the next part is given where gradients are wanted.

        Some architectures compute in another order then.
        """
        if part.spec.is_last:
            return None
        return part(given if part.spec.is_first else _differentiable(given)).detach()

    def _gradients(self, inputs: Sequence[Any], labels: torch.Tensor) -> Named:
        """Go back from Top to Bottom, each part's output gradient being the next one's input's."""
        found: Named = {}
        upstream: Named = {}
        specs = reversed(self._plan.components)
        for spec, given in zip(specs, reversed(inputs[:-1]), strict=True):
            gradients = self._backward(spec, given, labels, upstream)
            upstream = {name: g for name, g in gradients.items() if _is_input(name)}
            found = {name: g for name, g in gradients.items() if not _is_input(name)} | found
        return found

    def _backward(
        self, spec: ComponentSpec, given: Any, labels: torch.Tensor, upstream: Named
    ) -> Named:
        """Return the gradients of one part's parameter, and of its input.

        All that holds on to the part ends with this call: the graph would keep its weights.
        """
        part = self._load(spec)
        name = self._parameters.get(spec.name)
        wanted: Named = {} if name is None else {name: part.model.get_parameter(name)}
        if not spec.is_first:
            given = _differentiable(given.detach())
            wanted |= _inputs(given)
        labels = labels.to(part.device)
        if spec.is_last:
            return _differentiate(part(given, labels=labels).loss, wanted)
        return _go_back(_inputs(part(given)), wanted, upstream)


def _differentiable(given: torch.Tensor | HiddenState) -> torch.Tensor | HiddenState:
    """Let gradients reach whatever of a part's input can have one."""
    for tensor in _inputs(given).values():
        tensor.requires_grad_()
    return given


def _inputs(given: torch.Tensor | HiddenState) -> Named:
    """Return the tensors of a part's input or output that can have gradients, by name."""
    whole = HiddenState.of(given)
    beside = {f"{_INPUT}.{name}": value for name, value in whole.side.items()}
    tensors = {_INPUT: whole.tensor, **beside}
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


def _is_input(name: str) -> bool:
    """Whether a name is of a part's input, not of a parameter."""
    return name == _INPUT or name.startswith(f"{_INPUT}.")


def _through(
    part: SplitModel, steps: Sequence[Step], values: Sequence[Any], cache: Any
) -> list[Any]:
    """Run a check's steps through a part."""
    with torch.no_grad():
        return [
            part(value, attention_mask=step.mask, past_key_values=cache)
            for step, value in zip(steps, values, strict=True)
        ]


def _series(
    trial: Trial, check: str, forward: Callable[[Step, Any], torch.Tensor], cache: Any
) -> Named:
    """Return the logits of each step's real tokens: [tokens, vocabulary]."""
    with torch.no_grad():
        return {step.name: forward(step, cache).cpu()[step.real] for step in trial.steps(check)}


def _generated(trial: Trial, model: PreTrainedModel, device: torch.device) -> Named:
    """Return what a model makes of the padded batch, taking the likeliest token each time."""
    generate: Any = model.generate
    with torch.no_grad():
        tokens = generate(
            trial.ids.to(device),
            attention_mask=trial.mask.to(device),
            max_new_tokens=trial.new_tokens,
            min_new_tokens=trial.new_tokens,  # an early end would compare less
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
        )
    return {"tokens": tokens.cpu()}


def _differentiate(output: torch.Tensor, wanted: Mapping[str, torch.Tensor]) -> Named:
    """Return the gradients of `wanted` by a loss; zeros for what it does not depend on."""
    return _go_back({_INPUT: output}, wanted, {})


def _go_back(
    outputs: Named, wanted: Mapping[str, torch.Tensor], upstream: Mapping[str, torch.Tensor]
) -> Named:
    """Return the gradients of `wanted`, given those of the outputs; a loss has none."""
    if not wanted:
        return {}
    starts = {name: output for name, output in outputs.items() if output.requires_grad}
    found = torch.autograd.grad(
        list(starts.values()),
        list(wanted.values()),
        grad_outputs=[upstream[n].to(o.device) for n, o in starts.items()] if upstream else None,
        allow_unused=True,
    )
    return {
        name: (torch.zeros_like(tensor) if gradient is None else gradient).cpu()
        for (name, tensor), gradient in zip(wanted.items(), found, strict=True)
    }
