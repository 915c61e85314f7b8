export default {
  render({ model, el }) {
    let view;
    const redraw = () => {
      el.replaceChildren();
      view = draw(el, model.get("payload"), {
        selected: model.get("selected"),
        onSelect: (value) => {
          model.set("selected", value);
          model.save_changes();
        },
      });
    };
    const select = () => view.select(model.get("selected"));
    redraw();
    model.on("change:payload", redraw);
    model.on("change:selected", select);
    return () => {
      model.off("change:payload", redraw);
      model.off("change:selected", select);
    };
  },
};
