"""SECURITY.md, sentence by sentence: each row and promise has tests that would fail if it were not true."""

import re
import socket
from pathlib import Path

import pytest
from releasable_run import write_run
from typer.testing import CliRunner

from deploypipe.cli import app

PAGE = Path(__file__).parents[1] / "SECURITY.md"

# The beginning of each row or promise -> the tests that guard it, "file::function".
GUARDS = {
    "A bundle, a golden folder": (
        "release/test_bundle.py::test_signatures",
        "release/test_bundle.py::test_a_flipped_bit_is_seen",
        "release/test_bundle.py::test_harm_is_named",
        "export/test_verify.py::test_damage_is_found_before_anything_is_parsed",
        "export/test_verify.py::test_files_that_are_not_listed_are_not_used",
        "export/test_verify.py::test_a_golden_file_that_is_no_file_is_not_read",
        "export/test_verify.py::test_a_model_elsewhere_is_not_opened",
        "test_hostile_onnx.py::test_samples_are_bounded_before_they_are_read",
        "test_hostile_onnx.py::test_files_of_absurd_size_are_not_read",
    ),
    "A registry": (
        "release/test_object_registry.py::test_what_was_changed_in_the_store_is_refused",
        "release/test_hostile_registry.py::test_odd_objects_of_a_store",
        "release/test_hostile_registry.py::test_an_odd_file_of_aliases_is_an_error",
        "release/test_hostile_registry.py::test_a_promotion_writes_nothing_outside",
        "release/test_hostile_registry.py::test_a_bundle_of_another_name_is_refused",
        "release/test_hostile_registry.py::test_a_stores_bundle_of_another_name_is_refused",
        "release/test_bundle.py::test_commands",
    ),
    "An ONNX file": (
        "export/test_onnx_file_check.py::test_hostile_tensors",
        "export/test_onnx_file_check.py::test_hostile_models",
        "test_hostile_onnx.py::test_bench_ends_with_one_error",
        "test_hostile_onnx.py::test_memory_is_limited_to_what_is_asked",
        "test_hostile_onnx.py::test_batch_sizes_that_never_end_are_not_swept",
        "test_hostile_onnx.py::test_verify_ends_with_one_error",
        "test_hostile_onnx.py::test_no_process_outlives_the_one_that_watches_it",
        "test_hostile_onnx.py::test_a_baseline_that_never_ends_is_not_timed",
    ),
    "A TensorRT engine": (
        "export/test_tensorrt_engine.py::test_an_exchanged_engine",
        "export/test_tensorrt_engine.py::test_of_another_version",
        "export/test_tensorrt_engine.py::test_for_another_gpu",
    ),
    "Saved networks": (
        "pruning/test_plan_and_saved.py::test_a_saved_network_loads_with_and_without_its_class",
        "test_hostile_programs.py::test_only_who_says_so_loads_a_program",
    ),
    "A `.pt2` program": (
        "test_hostile_programs.py::test_only_who_says_so_loads_a_program",
        "test_hostile_programs.py::test_a_program_in_a_run_or_a_bundle_is_bytes_to_all_commands",
    ),
    "Weights for a pipeline": ("test_hostile_programs.py::test_a_pickle_in_place_of_tensors_is_an_error",),
    "Target and waiver files": (
        "test_hostile_settings.py::test_a_target_file_that_makes_no_sense_is_one_line",
        "test_hostile_settings.py::test_any_text_of_any_setting",
        "release/test_decide_again.py::test_waivers_that_say_too_little_are_refused",
        "test_hostile_settings.py::test_any_value_of_any_field",
        "test_hostile_settings.py::test_any_bytes_as_a_file",
    ),
    "`provider_options`": (
        "test_provider_options.py::test_an_option_that_may_load_a_library_is_refused",
        "test_provider_options.py::test_a_person_allows_them_on_the_command_line",
    ),
    "The database of a shared search": (
        "test_worker_code_check.py::test_other_code_is_not_executed",
        "test_worker_code_check.py::test_a_job_of_another_run_is_not_executed",
        "test_worker_code_check.py::test_source_is_read_without_importing",
    ),
    "The cache": (
        "search/test_latency_store.py::test_a_flipped_bit_or_lost_byte_never_changes_a_latency",
        "release/test_hostile_registry.py::test_a_damaged_bundle_in_the_cache_is_downloaded_again",
    ),
    "Names of targets": (
        "test_safe_names.py::test_odd_names_are_refused_by_what_is_odd",
        "test_safe_names.py::test_no_command_takes_one",
        "test_safe_names.py::test_names_in_results_aliases_and_calls",
    ),
    "Study file": (),  # a statement of what is not guarded, like the next
    "Pipeline files": (),
    "No file is unpickled": ("test_hostile_programs.py::test_programs_have_one_door_and_pickles_none",),
    "No code from a bundle": (
        "test_hostile_programs.py::test_a_program_in_a_run_or_a_bundle_is_bytes_to_all_commands",
        "test_provider_options.py::test_an_option_that_may_load_a_library_is_refused",
    ),
    "Names, reasons and other texts": (
        "test_hostile_names.py::test_markdown",
        "test_hostile_names.py::test_no_text_is_markup_in_markdown",
        "test_hostile_names.py::test_junit_is_xml_that_any_parser_reads",
        "test_hostile_names.py::test_html_shows_text",
        "test_hostile_names.py::test_the_terminal_is_not_steered",
        "test_hostile_names.py::test_a_ci_server_is_given_no_orders",
        "test_hostile_names.py::test_the_overviews_links_stay_in_its_folder",
        "test_hostile_names.py::test_json_has_no_bare_nan_and_gives_it_back",
        "test_hostile_names.py::test_json_is_read_strictly",
    ),
    "Nothing is sent anywhere": (
        "test_security_page.py::test_no_connection_is_opened",
        "report/test_html.py::test_report_leads_with_the_decision_and_fetches_nothing",
        "release/test_mlflow_registry.py::test_a_bundle_is_logged_registered_and_found_again",
    ),
    "Of an address": (
        "test_masked_addresses.py::test_no_form_shows_a_password",
        "test_masked_addresses.py::test_a_reference_that_names_no_bundle",
        "test_masked_addresses.py::test_a_search_that_cannot_reach_its_storage",
        "release/test_mlflow_registry.py::test_a_password_in_the_address_is_not_told",
    ),
}


def promises() -> list[str]:
    """The rows of the table and the points below it, up to what is not checked."""
    text = PAGE.read_text(encoding="utf-8").partition("## Who may be hostile")[2].partition("## What is not checked")[0]
    rows = [line.strip("| ") for line in text.splitlines() if line.startswith("| ")]
    return rows[1:] + re.findall(r"^- (.*)$", text, re.MULTILINE)  # the first row is the head


def test_each_promise_has_its_tests() -> None:
    for promise in promises():
        assert [start for start in GUARDS if promise.startswith(start)], f"no test is named for: {promise[:80]}"
    for start, tests in GUARDS.items():
        assert [promise for promise in promises() if promise.startswith(start)], f"SECURITY.md has no {start!r}"
        for test in tests:
            file, _, name = test.partition("::")
            text = (Path(__file__).parent / file).read_text(encoding="utf-8")
            assert re.search(rf"def {name}\b", text), f"{test} is gone"


def test_no_connection_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cyclonedx", reason="bills of materials need cyclonedx-python-lib")
    write_run(tmp_path / "run")
    tried = []
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, lambda *arguments: tried.append(arguments))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments: tried.append(arguments))
    monkeypatch.chdir(tmp_path)
    for command in (
        ["verify", "run"],
        ["gate", "run"],
        ["report", "run"],
        ["release", "run"],
        ["doctor"],
        ["targets"],
    ):
        assert CliRunner().invoke(app, command).exit_code == 0, command
    [bundle] = (tmp_path / "bundles").glob("digits-*")
    assert CliRunner().invoke(app, ["promote", str(bundle)]).exit_code == 0
    assert tried == []
