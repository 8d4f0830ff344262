"""The results as short tables of markdown."""

# Precision, PyTorch's form, and the least ratio: ours over PyTorch's tokens per second.
RATIO_GOALS = [
    ("G1", "f32", "eager", 1.1),
    ("G2", "tf32", "eager", 1.1),
    ("G3", "bf16", "eager", 1.3),
    ("G4", "bf16", "compile", 1.0),
]
RATIO_SHAPES = ("41M", "124M")
LONG = "124M-32x1024"
FIRST_STEP_S = {"cold": 5.0, "warm": 2.0}
LONG_TOKENS_PER_S = 450_000
CUT_RATIO = 0.95
FORMS = ("eager", "compile", "compile reduce-overhead")


def tables(results):
    return "\n\n".join(part for part in (machine(results), checks(results), speeds(results), goals(results)) if part) + "\n"


def machine(results):
    host, gpu, binary = (results.find("device", name=name) for name in ("host", "gpu", "fusionllm"))
    torch = next((r["torch"] for r in results.records if "torch" in r), "none")
    return (
        f"{gpu.get('card', 'no GPU')}, driver {gpu.get('driver', '?')}; {host.get('cpu', '?')}, {host.get('cpus', '?')} cores; "
        f"{binary.get('version', 'no binary')}, commit {host.get('commit')}; PyTorch {torch}"
    )


def checks(results):
    """What was right and what was wrong."""
    judged = [r for r in results.records if "ok" in r or "skipped" in r]
    if not judged:
        return ""
    return markdown(["part", "check", "result", "what was seen"], [[r["part"], r["name"], verdict(r), seen(r)] for r in judged])


def verdict(record):
    if "skipped" in record:
        return "skipped"
    return "ok" if record["ok"] else "**FAILED**"


def seen(record):
    if record.get("skipped") or record.get("error"):
        return shortened((record.get("skipped") or record["error"]).replace("\n", " ").replace("|", "/"))
    if "passed" in record:
        return f"{record['passed']} passed, {record['failed']} failed, {record['ignored']} ignored {' '.join(record['failures'][:5])}"
    if "unequal_from_step" in record:
        return f"{record['apart']:.1e} apart; unequal from step: {record['unequal_from_step']}" if not record["ok"] else "equal bit for bit"
    if "limit" in record:
        if "worse" in record:
            return f"{record['worse']:+.1e} of f32's loss, evaluation {record['eval_worse']:+.1e}, limit {record['limit']:.0e}"
        return f"{record['apart']:.1e} apart, limit {record['limit']:.0e}"
    return f"{record['errors']} errors, {record['hazards']} hazards in {record['processes']} processes"


def shortened(text):
    """A text's beginning, and its end, where errors say what they are."""
    return text if len(text) <= 170 else f"{text[:60]} … {text[-100:]}"


def speeds(results):
    """Both sides by shape and precision."""
    pairs = dict.fromkeys((r["shape"], r["precision"]) for r in results.records if r["part"] in ("speed", "pytorch") and "shape" in r)
    if not pairs:
        return ""
    rows = []
    for shape, precision in pairs:
        ours = results.find("speed", shape=shape, precision=precision)
        row = [shape, precision, milliseconds(ours.get("step_s")), rate(ours.get("tokens_per_s")), spread(ours), memory(ours.get("memory_mib"))]
        for form in FORMS:
            peer = results.find("pytorch", shape=shape, precision=precision, form=form)
            row.append(f"{milliseconds(peer.get('step_s_median'))}, {ratio_text(ratio(ours, peer))}" if "tokens_per_s" in peer else "")
        eager = results.find("pytorch", shape=shape, precision=precision, form="eager")
        peak = eager.get("peak_memory_bytes")
        rows.append([*row, memory(peak and peak / 2**20)])
    heads = ["shape", "precision", "ours, ms", "tokens/s", "blocks, ms", "memory, GiB"]
    return markdown([*heads, "eager: ms, ×", "compile: ms, ×", "reduce-overhead: ms, ×", "eager's memory, GiB"], rows)


def goals(results):
    """Each goal of the parts that were run."""
    rows = [*ratio_goals(results), *own_goals(results), *cut_goals(results)]
    parts = {record["part"] for record in results.records}
    shown = [row[1:] for row in rows if row[0] in parts]
    return markdown(["goal", "what", "measured", "wanted", "met"], shown) if shown else ""


def ratio_goals(results):
    for goal, precision, form, least in RATIO_GOALS:
        for shape in RATIO_SHAPES:
            ours = results.find("speed", shape=shape, precision=precision)
            value = ratio(ours, results.find("pytorch", shape=shape, precision=precision, form=form))
            yield goal_row("speed", goal, f"{precision} over PyTorch {form}, {shape}", value, least, "×")


def own_goals(results):
    for start, most in FIRST_STEP_S.items():
        value = results.find("speed", start=start).get("until_first_step_s")
        yield goal_row("speed", "G5", f"start to end of first step, {start}", value, most, "s", at_most=True)
    value = results.find("speed", shape=LONG, precision="bf16").get("tokens_per_s")
    yield goal_row("speed", "G6", f"bf16, {LONG}", value, LONG_TOKENS_PER_S, "tokens/s")


def cut_goals(results):
    for precision in ("bf16", "f32"):
        one = results.find("cut", precision=precision, placement="one stage")
        for placement in ("two CompNodes", "two stages of one CompNode"):
            value = ratio(results.find("cut", precision=precision, placement=placement), one)
            yield goal_row("cut", "G7", f"{placement} over one stage, {precision}", value, CUT_RATIO, "×")


def goal_row(part, goal, what, value, wanted, unit, at_most=False):
    """A row of the table of goals, the part that measures it in front."""
    bound = f"{'≤' if at_most else '≥'} {wanted:,} {unit}"
    if value is None:
        return [part, goal, what, "not measured", bound, ""]
    met = value <= wanted if at_most else value >= wanted
    shown = f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"
    return [part, goal, what, f"{shown} {unit}", bound, "yes" if met else "**no**"]


def ratio(ours, other):
    """Our tokens per second over the other's, where both were measured."""
    if "tokens_per_s" not in ours or "tokens_per_s" not in other:
        return None
    return ours["tokens_per_s"] / other["tokens_per_s"]


def ratio_text(value):
    return "" if value is None else f"{value:.2f}"


def milliseconds(seconds):
    return "" if seconds is None else f"{seconds * 1e3:.2f}"


def rate(value):
    return "" if value is None else f"{value:,.0f}"


def spread(record):
    return f"{milliseconds(record['step_s_min'])} to {milliseconds(record['step_s_max'])}" if "step_s_min" in record else ""


def memory(mib):
    return "" if mib is None else f"{mib / 1024:.1f}"


def markdown(heads, rows):
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
