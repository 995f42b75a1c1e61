/* Memory & speed: machine, sequences and view are plain selects; any change asks for new figures. */
element.addEventListener("change", () => {
  trigger("pick", Object.fromEntries([...element.querySelectorAll("select")].map(s => [s.name, s.value])));
});
