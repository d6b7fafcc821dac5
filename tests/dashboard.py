"""What the panels of TGI's Grafana dashboard ask Prometheus for, and whether a scrape has it.

Each row is a series as a panel's query selects it, without ``container``, which Prometheus adds; and the label that the
query groups by. Extracted from the queries of ``assets/tgi_grafana.json``.
"""

import re

PANELS: list[tuple[str, dict[str, str], str | None]] = [
    ("tgi_batch_concat", {}, "reason"),
    ("tgi_batch_concat_duration_bucket", {"method": "decode"}, "le"),
    ("tgi_batch_current_max_tokens", {}, None),
    ("tgi_batch_current_size", {}, None),
    ("tgi_batch_decode_duration_bucket", {"method": "decode"}, "le"),
    ("tgi_batch_filter_duration_bucket", {"method": "decode"}, "le"),
    ("tgi_batch_forward_duration_bucket", {"method": "decode"}, "le"),
    ("tgi_batch_inference_duration_bucket", {"method": "decode"}, "le"),
    ("tgi_batch_inference_duration_bucket", {"method": "prefill"}, "le"),
    ("tgi_queue_size", {}, None),
    ("tgi_request_count", {}, None),
    ("tgi_request_duration_bucket", {}, "le"),
    ("tgi_request_failure", {}, "err"),
    ("tgi_request_generated_tokens_bucket", {}, "le"),
    ("tgi_request_generated_tokens_count", {}, None),
    ("tgi_request_generated_tokens_sum", {}, None),
    ("tgi_request_input_length_bucket", {}, "le"),
    ("tgi_request_mean_time_per_token_duration_bucket", {}, "le"),
    ("tgi_request_queue_duration_bucket", {}, "le"),
    ("tgi_request_skipped_tokens_bucket", {}, "le"),
    ("tgi_request_success", {}, None),
]
OF_THE_MOMENT = {"tgi_queue_size", "tgi_batch_current_size", "tgi_batch_current_max_tokens"}
"""Nothing of them is left when the work is done."""


def empty_panels(scrape: str) -> list[str]:
    """The series that a panel would miss, or show nothing of, after requests of all kinds."""
    samples = []
    for line in scrape.splitlines():
        if sample := re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line):
            samples.append((sample[1], dict(re.findall(r'(\w+)="([^"]*)"', sample[2] or "")), float(sample[3])))
    empty = []
    for wanted, selected, by in PANELS:
        values = [
            value
            for name, labels, value in samples
            if name == wanted and selected.items() <= labels.items() and (by is None or by in labels)
        ]
        if not values or not (wanted in OF_THE_MOMENT or any(values)):
            empty.append(f"{wanted}{selected}")
    return empty
