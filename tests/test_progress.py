from ray_retrieval.progress import Display


def test_away_from_a_terminal_progress_is_plain_lines(capsys):
    with Display().task("encode", 2000, "images") as advance:
        advance(500, "")  # too soon after the start to say anything
        advance(1500, "done")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert shown.err.startswith("encode: 2,000/2,000 images · ")
    assert shown.err.endswith("/s · 0 s left · done\n")


def test_quiet_says_nothing(capsys):
    display = Display(quiet=True)
    display.say("words")
    with display.task("encode", 1, "images") as advance:
        advance(1, "")
    assert capsys.readouterr() == ("", "")


def test_nothing_to_do_shows_nothing(capsys):
    with Display().task("encode", 0, "images") as advance:
        advance(0, "")
    assert capsys.readouterr().err == ""


def test_markup_in_names_is_shown_as_it_is(capsys):
    Display().say("note: [bold]file[/bold].png")
    assert "[bold]file[/bold].png" in capsys.readouterr().err
