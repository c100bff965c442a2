// a formula in a line that is longer than its line gets one of its own, which scrolls
const longFormulas = () => {
  for (const formula of document.querySelectorAll("article mjx-container:not([display])")) {
    formula.classList.remove("long");
    const line = formula.closest("p, li, td, th, dd").getBoundingClientRect();
    if (formula.getBoundingClientRect().right > line.right + 1) formula.classList.add("long");
  }
};
addEventListener("load", () => window.MathJax && MathJax.startup.promise.then(() => {
  longFormulas();
  addEventListener("resize", longFormulas);
}));
