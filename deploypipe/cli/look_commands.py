"""Look at finished runs and plans."""

from pathlib import Path
from typing import Annotated

import typer

from deploypipe.cli.app import LOOK, PLAN_HELP, RunArgument, app, plans
from deploypipe.cli.exit_codes import EXIT_DIFFERENT, exit_codes, say


@app.command(rich_help_panel=LOOK, epilog="Example: deploypipe report runs/digits-x86_cpu --out digits.html")
def report(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option(help="HTML file. Default: RUN/report.html.")] = None,
) -> None:
    """Write the report of a finished run: one HTML file that needs no network."""
    with exit_codes():
        from deploypipe.report.html import write_report
        from deploypipe.runs.result import load_result

        path = out or run / "report.html"
        write_report(load_result(run), path)
        say(path)


@app.command(rich_help_panel=LOOK, epilog="Example: deploypipe compare runs/digits-x86_cpu runs/digits-x86_server")
def compare(
    first: Annotated[Path, typer.Argument(metavar="RUN_A", help="Folder of a finished run.")],
    second: Annotated[Path, typer.Argument(metavar="RUN_B", help="Folder of another finished run.")],
) -> None:
    """Compare the models that two runs ship, figure by figure, and what the two removed."""
    with exit_codes():
        from deploypipe.cli.terminal import show_table
        from deploypipe.report.plan_tables import plan_differences
        from deploypipe.report.run_tables import COMPARISON_HEADER, comparison_rows
        from deploypipe.runs.result import load_plan, load_result

        results = load_result(first), load_result(second)
        show_table(f"{first} and {second}", COMPARISON_HEADER, comparison_rows(*results))
        if all(result.search for result in results):
            rows = plan_differences(load_plan(first), load_plan(second))
            if rows:
                show_table("Differences of their plans", ("what", "first", "second", "the second"), rows)
            else:
                say("their plans are equal")


@plans.command("show", epilog="Example: deploypipe plan show runs/digits-x86_cpu")
def plan_show(plan: Annotated[Path, typer.Argument(metavar="PLAN", help=PLAN_HELP)]) -> None:
    """Show what PLAN removes: blocks, and each group's width before and after."""
    with exit_codes():
        from deploypipe.cli.terminal import show_table
        from deploypipe.report.plan_tables import plan_rows
        from deploypipe.runs.result import load_plan

        loaded = load_plan(plan)
        show_table(
            f"Plan for model {loaded.model_fingerprint}", ("group", "width", "asked", "reason"), plan_rows(loaded)
        )
        say(f"removed blocks: {', '.join(loaded.blocks) or 'none'}")
        say(f"edited modules: {len({edit.module for edit in loaded.edits})}")


@plans.command("diff", epilog="Exit codes: 0 equal, 1 different, 2 error. Example: deploypipe plan diff runs/a runs/b")
def plan_diff(
    first: Annotated[Path, typer.Argument(metavar="FIRST", help=PLAN_HELP)],
    second: Annotated[Path, typer.Argument(metavar="SECOND", help=PLAN_HELP)],
) -> None:
    """Show how FIRST and SECOND differ. Two plans are equal if they remove the same from the same model."""
    with exit_codes():
        from deploypipe.cli.terminal import show_table
        from deploypipe.report.plan_tables import plan_differences
        from deploypipe.runs.result import load_plan

        rows = plan_differences(load_plan(first), load_plan(second))
        if rows:
            show_table("Differences", ("what", "first", "second", "the second"), rows)
        else:
            say("equal")
    if rows:
        raise typer.Exit(EXIT_DIFFERENT)
