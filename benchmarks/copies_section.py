"""The section of docs/results.md on copies of a lens, from copies.json."""

from __future__ import annotations

from typing import Any

from tables import RATIOS, SPEARMAN, percent, table_of, title

MEASURED = 9  # kernels of a copy
COPIES_MUST, COPIES_AIM, TRAINING_MIN = 0.45, 0.3, 30
DRAWS_OFF = 0.15
COPY_ROWS = {
    "design": "the lens as designed, nothing measured",
    "ours_0": "model, nothing measured (the mean copy)",
    "rbf": "thin-plate RBF through the 9",
    "mean_rbf": "mean of the training copies + RBF of the 9 differences",
    "pca": "PCA of fields with 8 symmetries, fitted to the 9",
    "ours": "**model, 9 kernels**",
    "ours_4": "model, 4 of the 9",
    "ours_1": "model, 1 of the 9",
    "noise_floor": "noise of the truth itself",
}
MOMENTS = {
    "centroid_mean": "mean centroid",
    "centroid_sd": "sd of the centroid",
    "size_mean": "mean size",
    "size_sd": "sd of the size",
}


def copies(found: dict[str, Any]) -> list[str]:
    """The section of copies.json."""
    sets, counts = found["sets"], found["copies"]
    lines = ["## Copies of one lens, from nine kernels", "", *_about_copies(found), ""]
    lines += [*_errors_of_copies(sets), "", *_verdict_of_copies(sets), "", "### Expected errors of copies", ""]
    lines += [*_calibration_of_copies(sets), "", "### Copies drawn from the prior", ""]
    return [*lines, *_draws(sets, counts["many"]), ""]


def _about_copies(found: dict[str, Any]) -> list[str]:
    counts, sources = found["copies"], ", ".join(found["sources"])
    times = "; ".join(
        f"{title(one['set'])}: {one['fit_s'] / 60:.1f} min of training, {one['latents']} latents, "
        f"{one['adapt_s']:.1f} s to take a copy and to foretell its field"
        for one in found["sets"]
    )
    return [
        f"The default model, trained on {counts['train']} copies on {found['grid']} x {found['grid']} field points "
        f"each; {counts['test']} copies that it has not seen are measured at 3 x 3 points and judged at "
        f"{found['sets'][0]['points']} random ones. Each element of a copy is out of line by itself; the standard "
        "deviations stand in `configs/render/copies`. Errors in %, in brackets 95 % intervals, by resampling copies "
        "and the points within each.",
        "",
        f"{times}. {found['machine']}, {found['threads']} threads, source {sources}.",
    ]


def _errors_of_copies(sets: list[dict[str, Any]]) -> list[str]:
    header = ["row"]
    for one in sets:
        header += [f"{title(one['set'])}: mean", "p95"]
    rows = [
        [told, *(text for one in sets for text in (percent(one["rows"][row], key) for key in ("mean", "p95")))]
        for row, told in COPY_ROWS.items()
    ]
    return table_of(header, rows)


def _verdict_of_copies(sets: list[dict[str, Any]]) -> list[str]:
    lines = []
    for one in sets:
        ratios = {row: one["ratios"][row] for row in ("rbf", "pca")}
        (rbf, rbf_bound), (pca, pca_bound) = ((ratio["mean"], ratio["mean_bound"]) for ratio in ratios.values())
        lines.append(
            f"- {title(one['set'])}: {rbf:.3f} (95 % bound {rbf_bound:.3f}) of thin-plate RBF through the nine "
            f"(target {COPIES_MUST}, aim {COPIES_AIM}: {_state(rbf_bound <= COPIES_MUST)}), {pca:.2f} "
            f"({pca_bound:.2f}) of the PCA of fields (target: below 1: {_state(pca_bound < 1)}); training "
            f"{one['fit_s'] / 60:.1f} min (target {TRAINING_MIN}: {_state(one['fit_s'] <= 60 * TRAINING_MIN)})."
        )
    return lines


def _state(held: bool) -> str:
    return "held" if held else "MISSED"


def _calibration_of_copies(sets: list[dict[str, Any]]) -> list[str]:
    rows, missed = [], []
    for one in sets:
        for judged in one["calibration"]:
            rank, ratio = judged["spearman"], judged["median_ratio"]
            told = ["-", "-"] if rank is None else [f"{rank:.2f}", f"{ratio:.2f}"]
            of_means = "-" if rank is None else f"{judged['spearman_of_means']:.2f}"
            counts = ", ".join(map(str, judged["measured"]))
            rows.append([title(one["set"]), counts, str(judged["n"]), *told, of_means])
            held = rank is not None and rank >= SPEARMAN and RATIOS[0] <= ratio <= RATIOS[1]
            if not held and (len(judged["measured"]) > 1 or judged["measured"] == [MEASURED]):
                kernels = "nine" if judged["measured"] == [MEASURED] else "any"
                missed.append(f"{title(one['set'])}, {kernels} ({', '.join(told)})")
    state = f"MISSED for {', '.join(missed)}" if missed else "held for every set"
    return [
        "As above. With no kernel measured the model answers with the mean copy, and expects what copies differ by. "
        "What the expectation is made of was chosen with training copies and with other copies than these in view "
        "(seed 1; those of seed 3 ranked 0.80, 0.84 and 0.72 at nine kernels before a family had as many latents as "
        "now). The rows over several numbers of kernels were added after nine alone had missed: they are high because "
        "errors differ much from number to number. The last column, which uses the truth, is how well errors would be "
        "ranked by the true mean error of each place times that of each copy: the rest is how a place differs from "
        "copy to copy.",
        "",
        *table_of(["copies", "kernels measured", "points", "rank correlation", "median ratio", "of true means"], rows),
        "",
        f"- Target, over any number of kernels, and with nine alone: at least {SPEARMAN}, and {RATIOS[0]} to "
        f"{RATIOS[1]}: {state}.",
    ]


def _draws(sets: list[dict[str, Any]], many: int) -> list[str]:
    rows, missed, unsure = [], [], []
    for one in sets:
        for moment, told in MOMENTS.items():
            row = one["draws"][moment]
            rows.append([title(one["set"]), told, *(_with_interval(row, key) for key in ("off", "ratio"))])
            where = f"the {told} of {title(one['set'])} ({row['off']:.2f})"
            if row["off"] > DRAWS_OFF:
                missed.append(where)
            elif row["off_interval"][1] > DRAWS_OFF:
                unsure.append(where)
    state = f"MISSED for {', '.join(missed)}" if missed else "held for all"
    doubt = f"; the interval reaches beyond it for {', '.join(unsure)}" if unsure else ""
    return [
        f"{many} copies out of the model's prior against {many} that were traced, none of them trained on: mean and "
        "standard deviation over copies of the centroid (both axes) and of the RMS radius of kernels, at 5 x 5 field "
        "points and each wavelength. Off: |drawn - traced| / |traced| over all of these; ratio: |drawn| / |traced|; in "
        "brackets 95 % intervals, by resampling the copies of both.",
        "",
        *table_of(["copies", "moment", "off", "ratio"], rows),
        "",
        f"- Target: off by at most {DRAWS_OFF}: {state}{doubt}.",
    ]


def _with_interval(row: dict[str, Any], key: str) -> str:
    low, high = row[f"{key}_interval"]
    return f"{row[key]:.3f} ({low:.3f}-{high:.3f})"
