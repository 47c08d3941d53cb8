// Two of the images lie over each other; the range's value says where the left one ends.
for (const figure of document.querySelectorAll('.compare')) {
  const stage = figure.querySelector('.stage');
  const range = stage.querySelector('input');
  const sides = ['left', 'right'];

  const shown = (side) => stage.querySelector(`img.${side}`);
  const move = () => {
    stage.style.setProperty('--at', `${range.value}%`);
    range.setAttribute(
      'aria-valuetext',
      `${range.value} % ${shown('left').dataset.version}, ${100 - range.value} % ${shown('right').dataset.version}`,
    );
  };
  const choose = (side, version) => {
    for (const image of stage.querySelectorAll('img')) {
      image.classList.toggle(side, image.dataset.version === version);
    }
    stage.querySelector(`.of-${side}`).textContent = shown(side).dataset.label;
    move();
  };

  range.addEventListener('input', move);
  for (const side of sides) {
    const select = figure.querySelector(`select[name=${side}]`);
    select.addEventListener('change', () => choose(side, select.value));
    choose(side, select.value);
  }
}
