import torch

from objdrive.sampling.finisher import Decoded, Finished, Finisher


def decoded(count):
    latents = torch.zeros(count, 4, 2, 2)
    latents[1] = torch.nan
    return Decoded.of(latents, torch.full((count, 3, 16, 16), 0.5))


def test_each_is_told_what_came_of_its_picture():
    told = {}
    finisher = Finisher()
    finisher.give(decoded(3), [lambda outcome, place=place: told.update({place: outcome}) for place in range(3)])
    finisher.close()
    assert [isinstance(told[place], Finished) for place in range(3)] == [True, False, True]
    assert told[1] is None
    assert told[2].image.getpixel((0, 0)) == (128, 128, 128)
    assert told[2].latents.shape == (4, 2, 2)


def test_one_that_cannot_be_told_leaves_the_others_theirs(caplog):
    def fails(outcome):
        raise RuntimeError("nobody listens")

    told = []
    finisher = Finisher()
    finisher.give(decoded(2), [fails, told.append])
    finisher.give(decoded(2), [told.append, told.append])
    finisher.close()
    assert len(told) == 3
    assert "could not be told" in caplog.text


def test_what_cannot_be_made_is_told_to_all(caplog):
    told = []
    finisher = Finisher()
    whole = decoded(2)
    finisher.give(Decoded(whole.finite, whole.latents, torch.zeros(2, 4, 4, 5), None), [told.append, told.append])
    finisher.close()
    assert [isinstance(outcome, Exception) for outcome in told] == [True, True]
    assert "2 pictures could not be made" in caplog.text
