"""
Take the pictures of the report that `docs/report.md` shows, and those of the site to look at: by hand, after a change
of either.

    pip install playwright              # drives the Chromium of the system, which has to be there
    make docs                           # for the pictures of the site
    python tests/helpers/screenshots.py FOLDER [--keep]

Writes every picture into FOLDER; `--keep` also writes those named in `KEPT` into `docs/images`, in fewer colours. The
runs are made up (`ppo_log`): a report of five real ones would take an hour to make.
"""

import argparse
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from trl_ext.report import write_report


ROOT = Path(__file__).parents[2]
DESKTOP, PHONE = (1200, 900), (390, 844)
KEPT = {
    "one_desktop": "report_desktop",
    "five_desktop": "report_five",
    "three_dark_hover": "report_dark",
    "one_phone": "report_phone",
}
COLOURS = 128
RUNS = {  # name -> options that differ, the reward and the KL at the end
    "ppo": ({}, 1.6, 1.2),
    "ppo-kl-0.1": ({"kl_coef": 0.1}, 1.45, 0.7),
    "ppo-head": ({"critic": "head", "critic_learning_rate": 1e-3}, 1.5, 1.1),
    "ppo-lr-1e-2": ({"learning_rate": 1e-2}, 1.1, 5.5),
    "ppo-two-epochs": ({"num_ppo_epochs": 2}, 1.62, 1.8),
}
PAGES = {  # page of the site -> where it is opened
    "index": "",
    "tutorial": "#ppo",  # wide commands
    "notebooks/dpo": "",
    "notebooks/ppo": "#the-actor",
    "api": "",
    "api/trainers": "#trl_ext.PPOTrainerX",
    "report": "",
}


def ppo_log(seed: int, reward: float, kl: float, kl_coef: float, steps: int = 120) -> list[dict[str, Any]]:
    """The lines of a PPO run whose reward rises to `reward` at a distance of `kl` nats."""
    draw, log, tokens = random.Random(seed), [], 0
    for step in range(steps + 1):
        done = step / steps
        score = reward - (reward - 0.9) * math.exp(-4 * done)
        if step % 20 == 0:
            held_out = {"score": score + draw.gauss(0, 0.03), "score_ci95": 0.11}
            log.append({"step": step} | {f"eval_reward/{key}": value for key, value in held_out.items()})
            log[-1] |= {"eval_kl/ref": kl * done, "time/elapsed": 21.0 * step}
        if step == 0:
            continue
        tokens += draw.randint(3000, 3400)
        log.append(
            {
                "step": step,
                "num_tokens": tokens,
                "time/elapsed": 21.0 * step,
                "terms/clip_objective": draw.gauss(0.01, 0.01),
                "terms/kl": abs(draw.gauss(kl * done / 20, 0.005)),
                "coef/kl": kl_coef,
                "terms/value_loss": abs(draw.gauss(0.1 + 0.5 * math.exp(-3 * done), 0.04)),
                "coef/vf": 0.5,
                "terms/entropy": draw.gauss(2.5 - done, 0.05),
                "coef/entropy": 0.01,
                "reward/score": score + draw.gauss(0, 0.12),
                "kl/ref": abs(draw.gauss(kl * done, 0.08)),
                "policy/clip_fraction": abs(draw.gauss(0.08, 0.02)),
                "policy/approx_kl": abs(draw.gauss(0.004, 0.001)),
                "value/explained_variance": draw.gauss(0.6 * (1 - math.exp(-5 * done)), 0.05),
                "completions/mean_length": draw.gauss(24, 2),
                "completions/clipped_ratio": abs(draw.gauss(0.3 - 0.2 * done, 0.03)),
                "time/generate": draw.gauss(9, 0.4),
                "time/score": draw.gauss(3, 0.2),
                "time/learn": draw.gauss(9, 0.4),
                "tokens_per_second": draw.gauss(75, 3),
                "learning_rate": 2.8e-3 * (1 - done),
                "grad_norm": abs(draw.gauss(1, 0.3)),
            }
        )
        line = log[-1]
        line["loss"] = kl_coef * line["terms/kl"] + 0.5 * line["terms/value_loss"] - 0.01 * line["terms/entropy"]
        line["loss"] -= line["terms/clip_objective"]
    return [*log, {"step": steps, "train_runtime": 21.0 * steps}]


def reports(folder: Path) -> dict[str, Path]:
    """Write the pages of the first, the first three and all five runs."""
    for seed, (name, (options, reward, kl)) in enumerate(RUNS.items()):
        run = folder / "runs" / name
        run.mkdir(parents=True, exist_ok=True)
        known = {"learning_rate": 2.8e-3, "kl_coef": 0.05, "critic": "model", "num_ppo_epochs": 1} | options
        log = ppo_log(seed, reward, kl, known["kl_coef"])
        state = {"log_history": log, "global_step": log[-1]["step"], "max_steps": log[-1]["step"]}
        (run / "trainer_state.json").write_text(json.dumps(state))
        facts = {"model": "SmolLM2-135M-Instruct", "parameters": "134,515,008", "hardware": "1 × CPU"}
        (run / "run.json").write_text(json.dumps({"begun": 1.7e9, "facts": facts, "options": known}))
    paths = {}
    for word, count in {"one": 1, "three": 3, "five": 5}.items():
        paths[word] = folder / f"{word}.html"
        write_report([folder / "runs" / name for name in [*RUNS][:count]], paths[word], picture=False)
    return paths


def take(
    browser: Browser, page: str, picture: Path, size: tuple[int, int], dark: bool = False, hover: int = 0
) -> None:
    """A picture of the window; with `hover`, of the curve of this number under the pointer."""
    scheme = "dark" if dark else "light"
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    tab = context.new_page()
    errors: list[str] = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("request", lambda request: errors.append(request.url) if request.url.startswith("http") else None)
    tab.goto(page)
    tab.wait_for_timeout(1500 if "#" in page else 600)  # the site scrolls slowly
    if hover:
        plot = tab.locator(".plot").nth(hover - 1)
        plot.evaluate("element => element.scrollIntoView({block: 'center'})")
        box = plot.bounding_box()
        tab.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.5 * box["height"])
        tab.wait_for_timeout(300)
    wide = tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    tab.screenshot(path=picture)
    context.close()
    print(f"{picture.name}: " + (f"{wide} pixels too wide; " if wide > 0 else "") + (", ".join(errors) or "ok"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--site", type=Path, default=ROOT / "build" / "docs")
    parser.add_argument("--keep", action="store_true")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for word, path in reports(given.folder).items():
            page = path.resolve().as_uri()
            take(browser, page, given.folder / f"{word}_desktop.png", DESKTOP)
            take(browser, page, given.folder / f"{word}_phone.png", PHONE)
            take(browser, page, given.folder / f"{word}_dark_hover.png", DESKTOP, dark=True, hover=2)
            take(browser, page, given.folder / f"{word}_phone_hover.png", PHONE, hover=2)
        for name, anchor in PAGES.items() if given.site.is_dir() else ():
            for word, size in {"desktop": DESKTOP, "phone": PHONE}.items():
                picture = given.folder / f"site_{name.replace('/', '_')}_{word}.png"
                take(browser, (given.site / f"{name}.html").resolve().as_uri() + anchor, picture, size)
        browser.close()
    for name, kept in KEPT.items() if given.keep else ():
        image = (
            Image.open(given.folder / f"{name}.png")
            .convert("RGB")
            .quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE)
        )
        image.save(ROOT / "docs" / "images" / f"{kept}.png", optimize=True)


if __name__ == "__main__":
    main()
