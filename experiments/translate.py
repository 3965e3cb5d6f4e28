"""Translates by a trained run: a file, standard input, a dialogue, or a split with its BLEU.

    python -m experiments.translate --workdir=runs/de-en --input=letter.txt --output=letter.en
    echo "Tommy kann nerven." | python -m experiments.translate --workdir=runs/de-en
    python -m experiments.translate --workdir=runs/de-en --split=test --average=5
    python -m experiments.translate --workdir=runs/de-en --split=test --every_checkpoint

The workdir alone is enough: it holds the config, the tokeniser and the weights. --split reads the
data of the run again, for its sources and references.
"""

import pathlib
import sys
from collections.abc import Iterator, Sequence

from absl import flags

from experiments import cli
from experiments.config import write_atomically
from experiments.options import UserError
from experiments.progress import Bar
from experiments.report.figures import scores_by_step, to_svg
from experiments.tasks.bleu import Score, corpus_scores
from experiments.translating import Hypothesis, Search, n_best
from experiments.workdirs import Translator

_WORKDIR = flags.DEFINE_string("workdir", None, "of the run that trained the model", required=False)
_SEED = flags.DEFINE_integer("seed", 0, "which seed of the run", lower_bound=0)
_INPUT = flags.DEFINE_string("input", "-", "file of sources, a line each; - is standard input")
_OUTPUT = flags.DEFINE_string("output", "-", "file of translations; - is standard output")
_REFERENCES = flags.DEFINE_multi_string(
    "references", [], "files of references for --input, a line each: prints BLEU and chrF"
)
_SPLIT = flags.DEFINE_enum(
    "split", None, ["validation", "test"], "translate this split of the run's data, and score it"
)
_BEAM = flags.DEFINE_integer("beam", None, "hypotheses kept; 1 is greedy; default: the run's")
_ALPHA = flags.DEFINE_float("alpha", None, "exponent of the length penalty; default: the run's")
_EXTRA = flags.DEFINE_integer("extra", None, "most tokens beyond the source's; default: the run's")
_N_BEST = flags.DEFINE_integer("n_best", 1, "translations of each source, at most --beam", 1)
_SCORES = flags.DEFINE_bool("scores", False, "print score and log-probability before each, by tabs")
_AVERAGE = flags.DEFINE_integer("average", 1, "take the mean of the last so many checkpoints", 1)
_EVERY = flags.DEFINE_bool(
    "every_checkpoint", False, "score --split with every checkpoint that is kept: BLEU by step"
)


def main() -> None:
    """Runs what the flags ask for."""
    if not _WORKDIR.value:
        raise UserError("--workdir=DIR is needed: the folder of a run of the task translation")
    _check_flags()
    translator = Translator.load(pathlib.Path(_WORKDIR.value), _SEED.value, _AVERAGE.value)
    search = translator.search(_BEAM.value, _ALPHA.value, _EXTRA.value)
    if _N_BEST.value > search.beam:
        raise UserError(f"--n_best must be at most --beam={search.beam}, got {_N_BEST.value}")
    print(f"parameters of step {', '.join(map(str, translator.steps))}", file=sys.stderr)
    if _EVERY.value and _SPLIT.value:
        _by_step(translator, search, _SPLIT.value)
    elif _SPLIT.value:
        sources, references = translator.split(_SPLIT.value)
        found = _translated(translator, sources, search)
        _score(found, references)
    elif _INPUT.value == "-" and sys.stdin.isatty():
        _converse(translator, search)
    else:
        sources = list(_lines(_INPUT.value))
        columns = [list(_lines(path)) for path in _REFERENCES.value]
        _check_columns(sources, columns)
        found = _translated(translator, sources, search)
        if columns:
            _score(found, list(zip(*columns, strict=True)))


def _check_flags() -> None:
    """Raises UserError for a flag that would do nothing beside the others."""
    if _EVERY.value and not _SPLIT.value:
        raise UserError("--every_checkpoint needs --split=validation or --split=test to score")
    idle = ("input", "references") if _SPLIT.value else ()
    idle += ("output", "n_best", "scores", "average") if _EVERY.value else ()
    given = [name for name in idle if flags.FLAGS[name].present]
    if given:
        beside = "--every_checkpoint" if _EVERY.value else "--split"
        raise UserError(f"--{', --'.join(given)} would do nothing beside {beside}: leave it out")


def _translated(
    translator: Translator, sources: Sequence[str], search: Search
) -> list[list[Hypothesis]]:
    """Translates and writes; progress goes to standard error."""
    with Bar() as bar:
        found = n_best(translator.model, translator.subwords, sources, search, progress=bar)
    text = "".join(f"{line}\n" for one in found for line in _shown(one))
    if _OUTPUT.value == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        write_atomically(pathlib.Path(_OUTPUT.value), text)
        print(f"wrote {len(found)} translations to {_OUTPUT.value}", file=sys.stderr)
    cut = sum(not one[0].finished for one in found)
    if cut:
        print(f"{cut} translations were cut at the limit of --extra", file=sys.stderr)
    return found


def _shown(hypotheses: Sequence[Hypothesis]) -> Iterator[str]:
    for one in hypotheses[: _N_BEST.value]:
        text = " ".join(one.text.splitlines())
        scores = f"{one.score:.4f}\t{one.log_probability:.4f}\t" if _SCORES.value else ""
        yield scores + text


def _score(found: Sequence[Sequence[Hypothesis]], references: Sequence[Sequence[str]]) -> None:
    for score in corpus_scores([one[0].text for one in found], references):
        print(f"{score}\t{score.signature}", file=sys.stderr)


def _by_step(translator: Translator, search: Search, split: str) -> None:
    """A line for every checkpoint, its step and scores, and a figure of them in the workdir."""
    sources, references = translator.split(split)
    found: dict[int, Sequence[Score]] = {}
    for step, model in translator.by_step():
        best = n_best(model, translator.subwords, sources, search)
        found[step] = corpus_scores([one[0].text for one in best], references)
        print("\t".join([str(step), *map(str, found[step])]), flush=True)
    print("\n".join(score.signature for score in found[step]), file=sys.stderr)
    path = translator.workdir / f"by_step_{split}.svg"
    write_atomically(path, to_svg(scores_by_step(found, split)))
    print(f"wrote {path}", file=sys.stderr)


def _converse(translator: Translator, search: Search) -> None:
    print("a line to translate, an empty one to end", file=sys.stderr)
    while True:
        try:
            source = input("> ")
        except EOFError:
            return
        if not source.strip():
            return
        (found,) = n_best(translator.model, translator.subwords, [source], search, batch_size=1)
        print("\n".join(_shown(found)), flush=True)


def _lines(path: str) -> Iterator[str]:
    """The lines of a file of UTF-8."""
    try:
        data = sys.stdin.buffer.read() if path == "-" else pathlib.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror})") from error
    if not data:
        raise UserError(f"{path} is empty: it must hold a sentence a line")
    for number, line in enumerate(data.splitlines(), 1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, line {number}: not UTF-8: convert the file") from error


def _check_columns(sources: Sequence[str], columns: Sequence[Sequence[str]]) -> None:
    for path, column in zip(_REFERENCES.value, columns, strict=True):
        if len(column) != len(sources):
            raise UserError(
                f"references must have a line for each source: {path} has {len(column)}, "
                f"{_INPUT.value} has {len(sources)}"
            )


if __name__ == "__main__":
    cli.run(main)
