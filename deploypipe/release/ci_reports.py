"""Write a decision for other tools: a pull request's comment, a CI server's list of tests."""

from xml.etree import ElementTree

from deploypipe.records import GateDecision, Status, Verdict
from deploypipe.release.model_card import check_table
from deploypipe.report.run_tables import before_after
from deploypipe.report.safe_markdown import plain, table
from deploypipe.runs.result import RunResult
from deploypipe.text.printable_text import printable


def markdown(result: RunResult) -> str:
    """The decision, its reason and the changes, as Markdown for a CI step summary or a comment."""
    mark = "✅" if result.decision.verdict is Verdict.SHIP else "🛑"
    name = f"{result.pipeline} on {result.target.name or result.target.runtime}"
    lines = [
        f"## {mark} {result.decision.verdict.value}: {plain(name)}",
        "",
        f"{plain(result.decision.reason)}.",
        "",
        *check_table(result.decision.checks),
        "",
        "<details><summary>Before and after compression</summary>",
        "",
        *table(("", "dense", "compressed", "change"), before_after(result)),
        "",
        "</details>",
        "",
    ]
    return "\n".join(lines)


def junit(result: RunResult) -> str:
    """The decision as JUnit XML: one test case for each check; UNKNOWN is an error, a waived check is skipped."""
    decision: GateDecision = result.decision
    counts = {
        "failures": sum(c.status is Status.FAIL and not c.is_settled for c in decision.checks),
        "errors": sum(c.status is Status.UNKNOWN and not c.is_settled for c in decision.checks),
        "skipped": sum(c.waiver is not None for c in decision.checks),
    }
    suite = ElementTree.Element(
        "testsuite",
        {
            "name": printable(f"deploypipe {result.pipeline} on {result.target.name}"),
            "tests": str(len(decision.checks)),
            **{name: str(count) for name, count in counts.items()},
        },
    )
    for check in decision.checks:
        case = ElementTree.SubElement(suite, "testcase", name=printable(check.name), classname="deploypipe.gate")
        if check.waiver is not None:
            ElementTree.SubElement(
                case, "skipped", message=printable(f"waived by {check.waiver.by}: {check.waiver.reason}")
            )
        elif check.status is Status.FAIL:
            ElementTree.SubElement(case, "failure", message=printable(check.reason))
        elif check.status is Status.UNKNOWN:
            ElementTree.SubElement(case, "error", message=printable(check.reason))
        ElementTree.SubElement(case, "system-out").text = printable(check.reason)
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"
