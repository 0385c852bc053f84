// Shows the samples that were asked for. Without this script all are shown.
const form = document.getElementById("filters");
if (form) {
  const samples = [...document.querySelectorAll(".sample")];
  const count = document.getElementById("count");
  const narrow = () => {
    const words = form.words.value.toLowerCase();
    let left = 0;
    for (const sample of samples) {
      const fits =
        (!form.usecase.value || sample.dataset.case === form.usecase.value) &&
        (!form.verdict.value || sample.dataset.verdicts.split("|").includes(form.verdict.value)) &&
        (!words || sample.textContent.toLowerCase().includes(words));
      sample.hidden = !fits;
      left += fits;
    }
    count.textContent = `${left} of ${samples.length} prompts`;
  };
  form.hidden = false;
  form.addEventListener("input", narrow);
  form.addEventListener("submit", (event) => event.preventDefault());
  narrow();
}
