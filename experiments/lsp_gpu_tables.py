"""Tables of the records of `lsp_gpu.py`, in Markdown."""


def tables(records):
    parts = (hardware, bandwidths, products, steps, programs)
    return "\n".join(text for text in (part(records) for part in parts) if text)


def table(title, head, rows):
    if not rows:
        return ""
    lines = [f"\n**{title}**\n", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def number(value, scale=1.0, digits=3):
    return "" if value is None else f"{value / scale:.{digits}g}"


def hardware(records):
    rows = []
    for r in records:
        if r["part"] == "hardware" and "figures" in r:
            f = r["figures"]
            rows.append(
                [r["device"], r["jax"], r["cores"], number(r["memory_total"], 1e9)]
                + [number(f.get(name), 1e9) for name in ("to_host", "to_device", "host_adam")]
                + [number(f["flops"], 1e12)]
            )
    head = ["device", "JAX", "cores", "GB", "GB/s to host", "GB/s to device"]
    return table("Machine", [*head, "Adam on the host, 1e9/s", "TFLOP/s"], rows)


def bandwidths(records):
    found = [r for r in records if r["part"] == "bandwidth" and "way" in r]
    sizes = sorted({r["mebibytes"] for r in found})
    kinds = list(dict.fromkeys((r["way"], r["direction"], r["condition"]) for r in found))
    rows = []
    for kind in kinds:
        own = {
            r["mebibytes"]: r for r in found if (r["way"], r["direction"], r["condition"]) == kind
        }
        speeds = [own[s]["product_speed"] for s in sizes if s in own and "product_speed" in own[s]]
        cells = [number(own[s]["gigabytes_per_second"]) if s in own else "" for s in sizes]
        rows.append([*kind, *cells, number(min(speeds, default=None))])
    head = ["way", "direction", "condition", *(f"{size:.3g} MiB" for size in sizes)]
    return table("Bandwidth, GB/s", [*head, "product beside it, of its speed alone"], rows)


def products(records):
    names = (
        "full_gradient", "core_gradient", "project_sparse", "project_dense",
        "project_dense_bfloat16", "project_built_bfloat16", "lift_sparse", "apply", "fit_step",
    )  # fmt: skip
    rows = [
        [r["shape"], f"{r['d_in']} x {r['d_out']}", r["subspace"], r["tokens"]]
        + [number(r.get(name), 1e-3) for name in names]
        for r in records
        if r["part"] == "products" and "d_in" in r
    ]
    head = ["shape", "kernel", "s", "tokens", *(name.replace("_", " ") for name in names)]
    return table("Products of one kernel, ms", head, rows)


def steps(records):
    found = [r for r in records if r["part"] in ("step", "cap") and "schedule" in r]
    kept = {}
    for r in found:  # the last of each
        if r["outcome"] != "ok" or "seconds" in r:
            key = (r["part"], r["shape"], r["schedule"], r["subspace"], r["link"], r["product"])
            kept[*key, r["batch"], r["length"], r.get("cap"), r["attention"], r["wire"]] = r
    native = {
        (r["shape"], r["batch"], r["length"]): r["seconds"]
        for r in kept.values()
        if r["schedule"] == "native" and r["part"] == "step" and "seconds" in r
    }
    rows = []
    for r in kept.values():
        base = native.get((r["shape"], r["batch"], r["length"]))
        seconds = r.get("seconds")
        cap = r.get("cap")
        if cap is not None:
            cap = f"{number(cap, 1e9)}{'' if r.get('cap_enforced') else ' (not enforced)'}"
        compressed = r["schedule"].startswith("lsp")
        rows.append(
            [r["shape"], r["schedule"], r["subspace"] if compressed else "", r["link"], r["wire"]]
            + [f"{r['batch']} x {r['length']}", cap or "", r["outcome"], number(seconds)]
            + [number(seconds / base if seconds and base else None)]
            + [number(r.get("predicted_seconds")), number(r.get("peak"), 1e9)]
            + [number(r.get("predicted_bytes"), 1e9), number(r.get("overlap"))]
            + [number(r.get("one_way")), number(r.get("both_ways"))]
        )
    head = ["shape", "schedule", "s", "link", "wire", "batch", "cap, GB", "outcome", "s per step"]
    head += ["x native", "predicted s", "peak GB", "predicted GB", "overlap"]
    return table("Steps", [*head, "bytes one way / model", "both ways / model"], rows)


def programs(records):
    found = [r for r in records if r["part"] == "programs" and "program" in r]
    names = list(dict.fromkeys(r["program"] for r in found))
    own = {}
    for r in found:
        key = (r["shape"], r["schedule"], r["subspace"], f"{r['batch']} x {r['length']}")
        own.setdefault(key, {})[r["program"]] = r["added"]
    rows = [
        [*key, *(number(values.get(name), 1e6) for name in names)] for key, values in own.items()
    ]
    title = "Memory of compiled programs beyond their arguments, MB"
    return table(title, ["shape", "schedule", "s", "batch", *names], rows)
