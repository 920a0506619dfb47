# Completion of gpt-oss-qat for bash. Use: eval "$(gpt-oss-qat --shell-completion install=bash)"

_gpt_oss_qat_complete() {
    local line="${COMP_LINE:0:COMP_POINT}" before separators word last known text
    local -a program
    word="${line##*[[:space:]]}"
    # The word before is taken from the line, because bash splits words at = : and @.
    before="${line%"$word"}"
    before="${before%"${before##*[![:space:]]}"}"
    before="${before##*[[:space:]]}"
    case "${COMP_WORDS[0]##*/}" in
        gpt-oss-qat) program=("${COMP_WORDS[0]}") ;;
        launch) program=(@PYTHON@) ;;
        *) program=("${COMP_WORDS[0]}" -m pipeline) ;;
    esac
    # bash replaces only the text after the last of these signs.
    separators="${COMP_WORDBREAKS//[^=:@]/}"
    last="$word"
    [[ -z "$separators" ]] || last="${word##*[$separators]}"
    known="${word%"$last"}"
    COMPREPLY=()
    while IFS=$'\t' read -r text _; do
        [[ -z "$text" ]] || COMPREPLY+=("${text#"$known"}")
    done < <(_GPT_OSS_QAT_BEFORE="$before" "${program[@]}" --shell-completion "query=$word" 2>/dev/null)
    if [[ ${#COMPREPLY[@]} -eq 1 && "${COMPREPLY[0]}" != *[=.] ]]; then
        COMPREPLY=("${COMPREPLY[0]} ")
    fi
}

# Completes `gpt-oss-qat …` and `scripts/launch …`.
_gpt_oss_qat() {
    _gpt_oss_qat_complete
}

# Completes `python -m pipeline …`. For all other commands of Python, the earlier completion is called.
_gpt_oss_qat_python() {
    if [[ "${COMP_WORDS[1]} ${COMP_WORDS[2]}" == "-m pipeline" && $COMP_CWORD -gt 2 ]]; then
        _gpt_oss_qat_complete
    elif [[ -n "${_GPT_OSS_QAT_EARLIER-}" ]]; then
        compopt +o nospace
        "$_GPT_OSS_QAT_EARLIER" "$@"
    else
        compopt +o nospace
    fi
}

# bash-completion loads the completion of Python at its first use. So load it before it is replaced.
if declare -F _completion_loader >/dev/null; then _completion_loader python; fi
if [[ "$(complete -p python 2>/dev/null)" =~ -F\ ([^ ]+) && "${BASH_REMATCH[1]}" != _gpt_oss_qat_python ]]; then
    _GPT_OSS_QAT_EARLIER="${BASH_REMATCH[1]}"
fi
complete -o default -o bashdefault -o nospace -F _gpt_oss_qat gpt-oss-qat scripts/launch
complete -o default -o bashdefault -o nospace -F _gpt_oss_qat_python python python3
