"""Every method on every task: impact in both spaces, its certainty, what became of examples."""

from figures import results, save
from mera_tl.plots import spi_dots, spi_heatmap, transitions
from mera_tl.report import records_frame


def main() -> None:
    save(spi_heatmap(results("methods_by_task", "*-raw.jsonl")), "spi_heatmap")
    latents = spi_heatmap(results("methods_by_task", "*-sae.jsonl"))
    latents.layout.title.text += ", in SAE latents"
    save(latents, "spi_heatmap_sae")
    few = records_frame(results("steer_or_abstain", "records-*.jsonl").to_dict("records"))
    save(spi_dots(few), "spi_dots")
    save(transitions(few), "transitions")


if __name__ == "__main__":
    main()
