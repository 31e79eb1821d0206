"""The program: options, what they name, and what is written of it."""

import argparse
import sys
from pathlib import Path

from megatron_sstoken.files import format_bytes, write_durably
from megatron_sstoken.report.export import ORDERS, export
from megatron_sstoken.report.gather import check_data, gather
from megatron_sstoken.report.prepared import PreparedData
from megatron_sstoken.report.record_files import RecordFile, data_fingerprint, find_records
from megatron_sstoken.report.runs import Run, open_runs
from megatron_sstoken.report.texts import Texts, texts_in_records, texts_of_prepared, texts_of_tokenizer
from megatron_sstoken.tool import HelpFormatter, add_debug, run_tool

DESCRIPTION = """Shows which tokens a run selected, whether that helps, and what drifts: one HTML page that needs nothing else.
--export writes its samples instead, or as well, ranked, with their input rows. docs/report.md tells how to read both."""


def parse_arguments(arguments: list[str] | None = None, program: str | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog=program, description=DESCRIPTION, formatter_class=HelpFormatter)
    parser.add_argument("--run", metavar="DIR", help="folder of a run (its checkpoints), or its logs")
    parser.add_argument("--compare", metavar="DIR", nargs="+", action="extend", help="runs to compare with")
    parser.add_argument(
        "--records", metavar="PATH", help="token records to use: a file of `score`, or a folder of files"
    )
    parser.add_argument("--data", metavar="DIR", help="prepared data of the records (default: as the run says)")
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="for records without texts (default: the one of the prepared data)"
    )
    parser.add_argument("--output", metavar="FILE.html", help="page to write")
    parser.add_argument("--samples", type=int, default=200, help="samples on the page")
    parser.add_argument("--seed", type=int, default=0, help="of the samples that are drawn at random")
    parser.add_argument("--export", metavar="FILE.jsonl", help="ranked samples to write")
    parser.add_argument("--order", choices=tuple(ORDERS), default="dropped", help="of --export: highest first")
    add_debug(parser)
    options = parser.parse_args(arguments)
    if options.run is None and options.records is None:
        parser.error("one of these is needed: --run DIR, or --records FILE")
    if options.output is None and options.export is None:
        parser.error("one of these is needed: --output FILE.html, or --export FILE.jsonl")
    if options.compare and options.run is None:
        parser.error("--compare needs --run, the run to compare with them")
    if options.samples < 1:
        parser.error(f"--samples={options.samples} must be 1 or more")
    return options


def main(arguments: list[str] | None = None, program: str | None = "python -m megatron_sstoken.report") -> int:
    """Entry point; returns the exit code: 0 done, 2 for a mistake of the user."""
    options = parse_arguments(arguments, program)
    return run_tool(lambda: report(options), debug=options.debug)


def report(options: argparse.Namespace) -> int:
    """Write what is asked for."""
    for name in ("output", "export"):
        _require_place(name, getattr(options, name))
    runs = open_runs([options.run, *(options.compare or ())]) if options.run else []
    files = find_records(options.records) if options.records else runs[0].records()
    data_fingerprint(files)  # one of them all
    data = _data_of(files, runs, options.data)
    texts = _texts_of(files, data, runs, options.tokenizer)
    if options.output:
        # Imported here: --export alone needs no page.
        from megatron_sstoken.report.page import render

        content = gather(runs, files, texts, data, num_samples=options.samples, seed=options.seed)
        page = render(content)
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        write_durably(Path(options.output), page)
        for sentence in content["verdict"].values():
            print(sentence)
        print(f"page: {options.output} ({format_bytes(len(page.encode()))})")
    if options.export:
        if not files:
            raise ValueError(
                "--export: the run wrote no token records: set logging.records_every, or name those of `score` with --records"
            )
        number, with_row = export(files, texts, data, options.export, options.order)
        print(f"samples: {options.export} ({number:,}, {with_row:,} with their input row)")
    return 0


def _require_place(option: str, path: str | None) -> None:
    if path is not None and Path(path).is_dir():
        raise ValueError(f"--{option}: {path} is a folder: name a file in it")


def _data_of(files: list[RecordFile], runs: list[Run], named: str | None) -> PreparedData | None:
    """The prepared data: as named, or as the run says; None where that is gone, or is other data by now."""
    if named is not None:
        data = PreparedData.open(named)
        if problem := check_data(files, data):
            raise ValueError(f"--data: {problem}: name the data that they were made of")
        return data
    said = runs and (runs[0].data.get("train") or runs[0].setting("data", "train"))
    if not said:
        return None
    try:
        data = PreparedData.open(runs[0].path(str(said)))
        problem = check_data(files, data)
    except (ValueError, OSError) as error:
        problem = str(error)
    if problem is None:
        return data
    print(f"note: {problem}: sources and input rows are left out (--data names prepared data)", file=sys.stderr)
    return None


def _texts_of(files: list[RecordFile], data: PreparedData | None, runs: list[Run], named: str | None) -> Texts:
    """Of the tokenizer that is named, of the records, or of the tokenizer of the prepared data."""
    if named is not None:
        return texts_of_tokenizer(named)
    texts = texts_in_records(files)
    if texts.is_known or data is None or not files:
        return texts
    try:
        return texts_of_prepared(data.manifest, [runs[0].setting("model", "hf_path") if runs else None])
    except ValueError as error:
        print(f"note: {error}; tokens are shown by their ids (--tokenizer names one)", file=sys.stderr)
        return texts
