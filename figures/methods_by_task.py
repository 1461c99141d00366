"""Every method on every task of the organism: impact, its certainty, what became of examples."""

from figures import results, save
from mera_tl.frames import records_frame
from mera_tl.plots import spi_dots, spi_heatmap, transitions


def main() -> None:
    records = results("steer_or_abstain", "records-*.jsonl")
    frame = records_frame(records.to_dict("records"))
    save(spi_heatmap(frame), "spi_heatmap")
    save(spi_dots(frame), "spi_dots")
    save(transitions(frame), "transitions")


if __name__ == "__main__":
    main()
