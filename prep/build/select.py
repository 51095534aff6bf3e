"""Which rows of the tokenised sources go into the set, and which are held out of it."""

from prep.build.limits import check_selections
from prep.build.request import BuildRequest
from prep.config import SourceConfig
from prep.inputs import Inputs
from prep.selection.decontamination.overlaps import Overlap, find_overlaps, read_questions
from prep.selection.mixture import Selections, select_mixture
from prep.selection.source import Source
from prep.sources.detect_format import conversion_of
from shared.disk import writing_to


def select(request: BuildRequest, inputs: Inputs, sources: list[Source]) -> Selections:
    """Return what the set takes of each source. Raises DataError where nothing is left."""
    mixture = inputs.mixture
    overlaps: list[list[Overlap]] = [[] for _ in sources]
    if mixture.decontaminate.files:
        # Questions are read like any source, in whatever format their first rows have.
        config = SourceConfig(path="")
        question_files = [
            (source, conversion_of(source, config, request.store)) for source in inputs.questions
        ]
        rows = [(source.resolved, source.counts.conversion) for source in sources]
        with writing_to(request.store):
            questions = read_questions(question_files, mixture.decontaminate)
            overlaps = find_overlaps(rows, questions, store=request.store, workers=request.workers)
    selections = select_mixture(mixture, sources, overlaps)
    check_selections(sources, selections, mixture)
    return selections
