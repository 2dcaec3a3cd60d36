#!/usr/bin/env bash
# kill_ranks.sh: kill.sh with two ranks, of which one is killed.
RANKS=2 STEPS=${STEPS:-20} KILLS=${KILLS:-3} exec "$(dirname "$0")/kill.sh"
