// The gallery: cards of one verdict, kind or step, or with some words (gallery.py).

for (const gallery of document.querySelectorAll(".gallery")) {
  const bar = gallery.querySelector(".choices"), selects = [...bar.querySelectorAll("select")], search = bar.querySelector("input");
  const cards = [...gallery.querySelectorAll("article")], more = gallery.querySelector("details");
  const texts = cards.map(card => card.textContent.toLowerCase());
  const choose = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const chosen = words.length > 0 || selects.some(select => select.value !== "*");
    let shown = 0;
    cards.forEach((card, i) => {
      const fits = selects.every(select => select.value === "*" || card.dataset[select.dataset.by] === select.value)
        && words.every(word => texts[i].includes(word));
      card.hidden = !fits;
      shown += fits;
    });
    if (more) {
      const within = [...more.querySelectorAll("article")].filter(card => !card.hidden).length;
      more.hidden = !within;
      if (chosen) more.open = true;
    }
    bar.querySelector("output").textContent = chosen ? `${shown} of ${cards.length}` : "";
  };
  for (const select of selects) select.onchange = choose;
  search.oninput = choose;
  bar.hidden = false;
  choose();
}
