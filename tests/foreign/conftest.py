"""The packages of requirements.txt, for these tests only."""

from tests.foreign.packages import prepare

prepare()
