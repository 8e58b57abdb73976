"""Verdicts in words."""

from __future__ import annotations

from ttt_sim.replay.verify import Plan, Verdict


def heading(plan: Plan) -> str:
    """What was executed, one line for all methods."""
    if plan.accumulate == "exact":
        sums = "products summed exactly and rounded once"
    else:
        sums = "products summed in float32, in the order of the tiles"
    return (
        f"{plan.model.name} on {plan.chip.name}, {plan.dtype}, {plan.batch} sequences: prompt of {plan.prefill_tokens} "
        f"tokens in calls of {plan.call_tokens}, then {plan.decode_tokens} decoded; {sums}"
    )


def describe(verdict: Verdict) -> str:
    """PASS with digests, or FAIL with what is wrong first; with other accumulation how far it leads away."""
    if verdict.failure is not None:
        return f"{verdict.method:<11} FAIL  {verdict.failure}"
    ran = f"{verdict.n_ops:,} ops in {verdict.n_kernels:,} kernels, {verdict.cycles:,} cycles"
    if verdict.n_different:
        share = verdict.n_different / verdict.n_elements
        return (
            f"{verdict.method:<11} RAN   {ran}; {verdict.n_different:,} of {verdict.n_elements:,} elements "
            f"({100 * share:.3g} %) differ from the exact sums, by at most {verdict.largest_error:.3g} of the largest "
            "element of their tensor"
        )
    digests = ", ".join(f"{kind} {digest[:16]}" for kind, digest in verdict.digests.items())
    return (
        f"{verdict.method:<11} PASS  {ran}; {verdict.n_tensors:,} tensors equal ({verdict.n_elements:,} elements), "
        f"FLOPs and bytes of every op equal; {digests}"
    )
