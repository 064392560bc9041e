"""Which plots a page has: each is drawn only if its data was recorded."""

from collections.abc import Mapping, Sequence

from deploypipe.records import ScoreSummary, SearchResult
from deploypipe.report import plots, search_plots
from deploypipe.report.joint_pareto import EvaluatedNetwork
from deploypipe.report.trade_off import trade_off
from deploypipe.report.trade_off_plot import trade_off_plot
from deploypipe.report.width_tables import stages_of
from deploypipe.runs.result import RunResult


def run_figures(result: RunResult, max_slices: int) -> dict[str, str]:
    """The plots of a run's report, by name."""
    figures: dict[str, str] = {"stages": plots.stage_times(result.stages)}
    if result.benchmark.dense.latency or result.benchmark.compressed.latency:
        figures["latencies"] = plots.latencies(result.benchmark)
    if any(result.benchmark.slices.values()) and result.benchmark.compressed.per_sample_metric:
        figures["slices"] = plots.slices(result.benchmark, result.metric, max_slices)
    if result.search:
        figures |= _search_figures(result, result.search)
    if result.training and result.training.epochs:
        figures["finetune"] = plots.finetune(result.training, result.metric)
    if result.repair and any(not row.reason for row in result.repair.rows):
        figures["repair"] = plots.repair_errors(result.repair)
    return figures | score_figures(result.scores)


def score_figures(summary: ScoreSummary | None) -> dict[str, str]:
    """The plots of what a scorer says."""
    if summary is None or not summary.groups:
        return {}
    figures = {"kept_information": plots.kept_information(summary)}
    if len(summary.block_names) > 1:
        figures["block_similarity"] = plots.block_similarity(summary)
    return figures


def overview_figures(networks: Sequence[EvaluatedNetwork], results: Mapping[str, RunResult | str]) -> dict[str, str]:
    """The plot of all targets' networks, if any target had a search."""
    searched = [r for r in results.values() if not isinstance(r, str) and r.search]
    if not searched or searched[0].search is None:
        return {}
    return {"front": search_plots.all_targets(networks, searched[0].search.dense, searched[0].metric)}


def _search_figures(result: RunResult, search: SearchResult) -> dict[str, str]:
    trade = trade_off(search, result.target, result.metric)
    figures = {"trade_off": trade_off_plot(trade, result.target)}
    if search.importances:
        figures["importances"] = search_plots.importances(search.importances)
    if search.latency_fit:
        figures["latency_fit"] = search_plots.latency_fit(search.latency_fit)
    for stage in stages_of(result.structures, search.trials[search.best].plan):
        if stage.layers:
            figures[f"widths of {stage.name}"] = search_plots.widths(stage)
    return figures
