"""Raw against SAE in numbers: reading, shifting, what is certified and won, and what it costs."""

from figures import results, save
from mera_tl.plots import number_table

NAME = "sae_or_raw"
WHERE = ["model", "layer", "kind", "space", "correction"]
KINDS = {"probe": "ridge", "logistic_probe": "logistic", "contrastive": "contrastive"}


def main() -> None:
    df = results(NAME, "records-*.jsonl")
    df = df.assign(certified=(df["decision"] == "STEER").astype(float), SPI=df["spi"])
    df = df.rename(columns={"steered_share": "steered", "cpu_seconds": "CPU s"})
    kinds = df["method"].str.removeprefix("optimal_").map(KINDS)
    won = df.assign(kind=kinds).groupby(WHERE)[["certified", "SPI", "steered", "CPU s"]].mean()
    names = {"auroc": "AUROC", "relative_shift": "shift", "reencoded_above": "above"}
    read = results(NAME, "reading-*.jsonl").rename(columns=names)
    read = read.groupby(WHERE)[[*names.values(), "cosine"]].mean()
    frame = read.join(won).reset_index(level=["space", "correction"])
    way = frame.pop("space") + frame.pop("correction").map({"gain": ", gain", "none": ""})
    frame.insert(0, "way", way)
    caption = "MERA's rule, means over tasks and splits; shift: norms, at .1; above: after it"
    figure = number_table(frame.reset_index(), title="Raw or SAE, in numbers", caption=caption)
    save(figure, f"{NAME}_table")


if __name__ == "__main__":
    main()
