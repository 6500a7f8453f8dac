"""What the model card says and only the owner of a model can know."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DepthScore:
    """One measured score; quality is never stated without the loops and the compute it took."""

    dataset: str
    metric: str
    value: float
    num_loops: int
    flops_per_token: float


@dataclass(frozen=True)
class CardFacts:
    """What only the owner of a model can say.

    Attributes:
        name: title of the card; None takes the folder's name.
        license: identifier of the Hub, such as "apache-2.0".
        language: codes such as "en"; "code" for program text.
        datasets: names of the training data, Hub identifiers where they exist.
        base_model: identifier of the model that this one was trained from.
        summary: one paragraph in Markdown.
        scores: measured results.
    """

    name: str | None = None
    license: str | None = None
    language: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    base_model: str | None = None
    summary: str | None = None
    scores: tuple[DepthScore, ...] = ()
