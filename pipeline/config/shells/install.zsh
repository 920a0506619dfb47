# Completion of gpt-oss-qat for zsh. Use after compinit: eval "$(gpt-oss-qat --shell-completion install=zsh)"

_gpt_oss_qat_complete() {
    local text meaning before="${words[CURRENT-1]}"
    local -a program=("$@") complete_words complete_texts begun_words begun_texts
    while IFS=$'\t' read -r text meaning; do
        [[ -n "$text" ]] || continue
        if [[ "$text" == *[=.] ]]; then
            begun_words+=("$text")
            begun_texts+=("$text${meaning:+  -- $meaning}")
        else
            complete_words+=("$text")
            complete_texts+=("$text${meaning:+  -- $meaning}")
        fi
    done < <(_GPT_OSS_QAT_BEFORE="$before" "${program[@]}" --shell-completion "query=$PREFIX" 2>/dev/null)
    if (( ${#complete_words} + ${#begun_words} )); then
        (( ${#begun_words} )) && compadd -S '' -l -d begun_texts -a begun_words
        (( ${#complete_words} )) && compadd -l -d complete_texts -a complete_words
    elif [[ "$PREFIX" == *=* ]]; then
        compset -P '*='
        _files
    else
        _files
    fi
}

_gpt_oss_qat() {
    if [[ "${words[1]:t}" == launch ]]; then
        _gpt_oss_qat_complete @PYTHON@
    else
        _gpt_oss_qat_complete "${words[1]}"
    fi
}

# Completes `python -m pipeline …`. For all other commands of Python, the earlier completion is called.
_gpt_oss_qat_python() {
    if [[ "${words[2]} ${words[3]}" == "-m pipeline" ]] && (( CURRENT > 3 )); then
        _gpt_oss_qat_complete "${words[1]}" -m pipeline
    elif [[ -n "${_gpt_oss_qat_earlier-}" ]]; then
        "$_gpt_oss_qat_earlier" "$@"
    else
        _files
    fi
}

if [[ -n "${_comps[python]-}" && "${_comps[python]}" != _gpt_oss_qat_python ]]; then
    typeset -g _gpt_oss_qat_earlier="${_comps[python]}"
fi
compdef _gpt_oss_qat gpt-oss-qat scripts/launch launch
compdef _gpt_oss_qat_python python python3
