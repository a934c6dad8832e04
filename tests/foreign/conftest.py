"""The packages of requirements.txt, for these tests only: `make check` runs them in a process of their own."""

from tests.foreign.packages import prepare

prepare()
