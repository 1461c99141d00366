"""What each published error costs, turned on alone: SPI and decisions, against the same without."""

from plotly.subplots import make_subplots

from figures import models_of, results, save
from mera_tl.plots import style

CAPTION = (
    "{models}, readout exact_anywhere; each published error alone<br>"
    "left: {n} (model, task, split) cells in grey, mean in blue; right: decisions, certified in "
    "blue, steered in grey"
)


def main() -> None:
    df = results("errata").assign(steers=lambda d: d["threshold"].notna())
    df["certified"] = df["certified"].eq(True)
    against = df.drop_duplicates("switch").set_index("switch")["against"]
    against = against.drop(against.unique())
    cells = df.pivot(index=["model", "task", "seed"], columns="switch")
    change = cells["spi"][against.index] - cells["spi"][against].to_numpy()
    figure = make_subplots(1, 2, column_widths=[0.62, 0.38], shared_yaxes=True)
    for values, colour in ((change, style.GREY), (change.mean().to_frame().T, style.BLUE)):
        x, y = values.to_numpy().ravel(), [*change.columns] * len(values)
        figure.add_scatter(x=x, y=y, mode="markers", marker_color=colour, marker_opacity=0.7)
    for name, colour in (("steers", style.GREY), ("certified", style.BLUE)):
        more = cells[name][against.index].sum().to_numpy() - cells[name][against].sum().to_numpy()
        figure.add_bar(x=more, y=against.index, orientation="h", marker_color=colour, row=1, col=2)
    figure.update_layout(xaxis_title="change of SPI", xaxis2_title="change in decisions")
    figure.update_yaxes(autorange="reversed")
    caption = CAPTION.format(n=len(cells), models=models_of(df, "n"))
    style.finish(figure, "", showlegend=False)
    save(figure, "errata", finding="Testing at all matters most", settings=caption)


if __name__ == "__main__":
    main()
