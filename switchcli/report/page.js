// Draws the charts of a page by Vega-Lite. Expressions are interpreted (ast), so that the page allows no eval.
(() => {
  "use strict";
  const { tables, figures } = JSON.parse(document.getElementById("data").textContent);

  const rows = (columns) => {
    const names = Object.keys(columns);
    return columns[names[0]].map((_, row) => Object.fromEntries(names.map((name) => [name, columns[name][row]])));
  };

  // The style sheet sets the colors of text, axes and grid, which follow light and dark.
  const config = {
    background: null,
    font: "system-ui, sans-serif",
    padding: 0,
    view: { stroke: null },
    axis: { labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal", domain: false, tickSize: 4 },
    axisY: { titleAnchor: "end", titleAngle: 0, titleAlign: "left", titleX: 0, titleY: -12 },
    legend: { labelFontSize: 12, titleFontSize: 12 },
  };
  const options = {
    mode: "vega-lite",
    ast: true,
    renderer: "svg",
    actions: false,
    defaultStyle: false,
    config,
    tooltip: { disableDefaultStyle: true },
  };

  const draw = async (plot) => {
    if (plot.dataset.drawn) return;
    plot.dataset.drawn = "true";
    const { spec, table } = figures[plot.dataset.figure];
    const { view } = await vegaEmbed(plot, { ...spec, data: { values: rows(tables[table]) } }, options);
    plot.view = view;
  };
  const drawAll = async (root) => {
    for (const plot of root.querySelectorAll(".plot")) {
      if (!plot.closest("details:not([open])")) await draw(plot);
    }
  };

  for (const details of document.querySelectorAll("details")) {
    details.addEventListener("toggle", () => drawAll(details));
  }
  drawAll(document);
})();
