def spectra(sweep, args):
    raise ValueError


def rank(sweep, args):
    raise ValueError


def angles(sweep, args):
    raise ValueError


def blocks(sweep, args):
    raise ValueError


def partition(sweep, args):
    raise ValueError


def importance(sweep, args):
    raise ValueError


def ends(sweep, args):
    raise ValueError


def gradients(sweep, args):
    raise ValueError


def outlook(sweep, args):
    raise ValueError


def permute(sweep, args):
    raise ValueError


