"""What a steering does to the task that it was made for, and to others: paired differences."""

from plotly.subplots import make_subplots

from figures import results, save
from mera_tl.plots import style


def main() -> None:
    df = results("side_effects").assign(of=lambda d: d["source"])
    real = df["model"] != "organism"
    df["of"] = df["of"].where(~real, df["of"] + " (" + df["model"] + ")")
    df["of"] = df["of"].where(df["certified"], df["of"] + ", not certified")
    figure = make_subplots(2, 3, subplot_titles=[*df["of"].unique()], horizontal_spacing=0.14)
    for number, (_, rows) in enumerate(df.groupby("of", sort=False)):
        points, own = 100 * rows[["difference", "low", "high"]], rows["task"] == rows["source"]
        place = {"row": 1 + number // 3, "col": 1 + number % 3}
        figure.add_scatter(
            x=points["difference"],
            y=rows["task"],
            error_x={
                "array": points["high"] - points["difference"],
                "arrayminus": points["difference"] - points["low"],
            },
            mode="markers",
            marker_color=[style.BLUE if each else style.GREY for each in own],
            **place,
        )
        figure.add_vline(x=0, line_width=1, line_color=style.GREY, **place)
    figure.update_xaxes(range=[100 * df["low"].min() - 5, 100 * df["high"].max() + 5])
    figure.update_yaxes(autorange="reversed", tickfont_size=10)
    sizes = ", ".join(f"{n} ({model})" for model, n in df.groupby("model")["n"].max().items())
    caption = f"steered minus unsteered, points, 95 % intervals; examples per task: {sizes}"
    figure.update_layout(height=560, meta={"min_width": 700})
    save(
        style.finish(figure, "Steered for one task, put on five", caption, showlegend=False),
        "side_effects",
    )


if __name__ == "__main__":
    main()
