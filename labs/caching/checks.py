"""Checks of the lab caching."""

from __future__ import annotations

import secrets
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from labkit.look import Look, Verdict, compare, failed, parse_metrics, partial, parts, passed

MNT: Final = "${ROOT:-}/mnt"
SIZE: Final = 60_000
"""Bytes of a file of the set, as lab.yml has it."""

# The ways in which a file is changed behind a cache's back, by g2: file -> shell text.
CHANGES: Final = {
    "longer": "echo more >> longer",
    "same-size": "tr a-z b-za < old > same-size",
    "kept-time": "touch -r kept-time time && tr a-z b-za < old > kept-time && touch -r time kept-time",
    "replaced": "tr a-z b-za < old > new && mv new replaced",
    "removed": "rm removed",
    "in-place": "printf X | dd of=in-place bs=1 seek=100 conv=notrunc status=none",
}


def read_all(tag: str) -> str:
    """Shell text that reads all files through a mount of the guest."""
    return f"cat {MNT}/{tag}/set/* {MNT}/{tag}/data | sha256sum"


def options(look: Look, place: str, point: str) -> tuple[str, str, set[str]]:
    """(source, type, options) of the mount at /mnt/POINT; empty if there is none."""
    script = f"awk -v at=\"{MNT}/{point}\" '$2 == at {{ print $1, $3, $4 }}' /proc/mounts | tail -n 1"
    words = look.out(place, script).split()
    return (words[0], words[1], set(words[2].split(","))) if len(words) == 3 else ("", "", set())


def metrics(look: Look, *tags: str) -> dict[str, dict[str, float]]:
    """The counters of several devices of the first guest, looked at at the same time."""
    text, guest = look.metrics(), look.system.name("guest")
    return {tag: parse_metrics(text, guest, tag) for tag in tags}


def modes(look: Look) -> Verdict:
    """The answers are what reading the same file again takes now, without a cache and with cache=loose."""
    for tag, loose in (("plain", False), ("loose", True)):
        source, kind, found = options(look, "guest", tag)
        if (source, kind) != (tag, "9p") or ("loose" in found) != loose:
            mode = "loose" if loose else "none"
            return failed(f"tag {tag}, mounted at /mnt/{tag} with cache={mode}", ",".join(sorted(found)) or "no mount")
    again = f"cat {MNT}/plain/data {MNT}/loose/data | wc -c"
    look.run("guest", again)
    before = metrics(look, "plain", "loose")
    look.run("guest", again)
    after = metrics(look, "plain", "loose")
    took = {tag: int(after[tag].get("Tread", 0) - before[tag].get("Tread", 0)) for tag in before}
    what = "{0}_again=..., how many Tread the second cat of data takes through /mnt/{0}"
    return parts({tag: compare(look.answer(f"{tag}_again"), took[tag], what.format(tag)) for tag in took})


def stale(look: Look) -> Verdict:
    """g1's loose mount goes on saying what g2 has changed meanwhile; and the words that the student saw."""
    name, old, new = f"proof-{secrets.token_hex(4)}", secrets.token_hex(8), secrets.token_hex(8)
    look.run("guest2", f"echo {old} > {MNT}/plain/{name}")
    look.run("guest", f"cat {MNT}/loose/{name}")
    look.run("guest2", f"echo {new} > {MNT}/plain/{name}")
    seen = look.out("guest", f"cat {MNT}/loose/{name}; cat {MNT}/plain/{name}").split()
    look.run("host", f'rm -f "$part/own/{name}"')
    wish = "g1 still says the old word through /mnt/loose, and the new one through /mnt/plain"
    return parts(
        {
            "now": passed() if seen == [old, new] else failed(wish, "the new one twice" if seen else "nothing to read"),
            "before": compare(look.answer("before"), look.values["before"], "before=..., what g1 went on saying"),
            "after": compare(look.answer("after"), look.values["after"], "after=..., what the board said by then"),
        }
    )


def mounted(look: Look) -> Verdict:
    """Whether both FUSE mounts are there."""
    for tag in ("slow", "fast"):
        _, kind, _ = options(look, "guest", tag)
        if kind != "fuse.xen9p":
            return failed(f"tag {tag}, mounted at /mnt/{tag} by xen9p mount", kind or "no mount")
    return passed()


def faster(look: Look) -> Verdict:
    """Bytes that come from the host when all is read a second time, and when one file of four has changed."""
    there = mounted(look)
    if there.part < 1:
        return there
    both = f"{read_all('slow')}; {read_all('fast')}"
    wanted = look.out("host", 'cd "$part/own" && cat set/* data | sha256sum').split()
    look.run("guest", both)
    counts = [metrics(look, "slow", "fast")]
    seen = look.out("guest", both).split()
    counts.append(metrics(look, "slow", "fast"))
    if seen[::2] != wanted[:1] * 2:
        return failed("the files as they are, through /mnt/slow and /mnt/fast", "others, or none")
    change = f"cd {MNT}/plain && tr a-z b-za < set/two > two.new && cat two.new > set/two && rm two.new"
    done = look.run("guest2", change)
    if done.code != 0:
        return failed("tag plain mounted at /mnt/plain in your second guest", done.said)
    look.run("guest", read_all("fast"))
    counts.append(metrics(look, "slow", "fast"))
    slow, fast = (int(counts[1][tag]["read_bytes"] - counts[0][tag]["read_bytes"]) for tag in ("slow", "fast"))
    changed = int(counts[2]["fast"]["read_bytes"] - counts[1]["fast"]["read_bytes"])
    if slow <= 0:
        return failed("/mnt/slow, mounted with --cache slow:Slow, reads all of it again", f"{slow} bytes")
    again = (
        passed() if fast == 0 else partial(0.5 if fast <= slow / 2 else 0.0, "no byte is read twice", f"{fast} bytes")
    )
    wish = f"one file of four has changed: about {SIZE} bytes are read anew"
    once = passed() if again.part > 0 and 0 < changed <= 2 * SIZE else failed(wish, f"{changed} bytes")
    return parts({"again": again, "changed": once})


def never(look: Look) -> Verdict:
    """Six ways to change a file, by g2; what g1 reads as soon as g2 is done. One old answer is one too many."""
    folder = f"never-{secrets.token_hex(4)}"
    names = " ".join(CHANGES)
    make = f'mkdir "$part/own/{folder}" && cd "$part/own/{folder}" && yes "an old line" | head -c 3000 > old'
    # Whole seconds: Linux's 9P client sets no others, and a time that g2 brings back must be the very one that it was.
    look.run("host", f'{make} && for n in {names}; do cp old $n; done; touch -d "@$(date +%s)" {names} time')
    wait = "for try in $(seq 400); do [ ! -e ready ] || break; sleep 0.05; done"
    sums = f"sha256sum {names} 2>/dev/null"
    # g1 goes on reading until g2 says that it is done, so that whatever is good for some time is in use at that moment.
    # Not kept-time: who saw it with its new time, before that is put back, would know of the change all the same.
    others = f"sha256sum {names.replace('kept-time ', '')} 2>/dev/null"
    reads = f"""
        plain={MNT}/plain/{folder} fast={MNT}/fast/{folder}
        cd $plain && (cd $fast) || {{ touch $plain/ready; exit 1; }}
        (cd $fast && {sums}) > /dev/null; (cd $fast && {sums}) > /dev/null; touch ready
        end=$((SECONDS + 60))
        until [ -e done ] || [ $SECONDS -ge $end ]; do (cd $fast && {others}) > /dev/null; done
        (cd $fast && {sums}); true"""
    writes = f"cd {MNT}/plain/{folder} || exit 1\n{wait}\n{'; '.join(CHANGES.values())}; touch done"
    with ThreadPoolExecutor(2) as both:
        reader, writer = both.submit(look.run, "guest", reads), both.submit(look.run, "guest2", writes)
        seen, wrote = reader.result(), writer.result()
    there = f'cd "$part/own/{folder}" && {{ {sums}; ls done; }}; rm -rf "$part/own/{folder}"'
    right = look.out("host", there).splitlines()
    if seen.code != 0 or wrote.code != 0 or right[-1:] != ["done"]:
        what = "/mnt/fast in your first guest, and /mnt/plain in both"
        return failed(what, (seen if seen.code else wrote).said)
    found, truth = (
        {line.split()[1]: line.split()[0] for line in lines} for lines in (seen.out.splitlines(), right[:-1])
    )
    old = [name for name in CHANGES if found.get(name) != truth.get(name)]
    return passed() if not old else failed("what g2 has written, each time", f"old data after: {', '.join(old)}")
